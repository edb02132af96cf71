"""Train a universal embedding model with GCL: from a recipe to a Hub-ready folder, `<output_dir>/model`.

    gcl train RECIPE [--key value ...]                                    one process
    accelerate launch -m universal_gcl.train RECIPE [--key value ...]     several

RECIPE is the path of a YAML file, or the name of one that comes with the package. `gcl train --help` lists every key.
"""

import sys
import time
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from universal_gcl.evaluation.environment import collect_environment, command_line
from universal_gcl.evaluation.pairs.pictures import draw_pictures
from universal_gcl.failures import failing_together, stop
from universal_gcl.publishing.push import check_may_push, push_folder
from universal_gcl.publishing.run_folder import save_trained, write_base, write_run_folder
from universal_gcl.quiet import quiet_libraries
from universal_gcl.training.build import build_run
from universal_gcl.training.closing import closing
from universal_gcl.training.precision import warn_if_bfloat16_is_slow
from universal_gcl.training.recipe import parse_recipe
from universal_gcl.training.run import TrainingRun
from universal_gcl.training.training_arguments import GCLTrainingArguments


def main(argv: list[str]) -> None:
    """
    Parse, build, train, evaluate, write and, if asked, push.

    Args:
        argv: the recipe and the options, without the program's name.

    Raises:
        SystemExit: the message is one line that says what is wrong and how to mend it.
    """
    started = time.time()
    quiet_libraries()
    try:
        recipe = parse_recipe(argv)
        # Trainer would push every checkpoint; only the finished folder is pushed here
        repo_id, recipe.training.push_to_hub = recipe.training.push_to_hub, None
        if repo_id is not None and recipe.training.process_index == 0:
            check_may_push(repo_id, recipe.training.hub_token)
        environment = collect_environment()  # now, since the checkout may change during the run
        warn_if_bfloat16_is_slow(recipe.training)
        save_base = partial(write_base, encoder=recipe.model.encoder, licence=recipe.model.licence)
        run = build_run(recipe, save_base)
    except (ValueError, OSError, SafetensorError) as error:
        stop(error)
    is_first = run.trainer.is_world_process_zero()
    if is_first:
        print(run.opening(), flush=True)
    folder = Path(str(recipe.training.output_dir)) / "model"
    try:
        run.train(save=lambda: save_trained(folder, run.model, run.processor, run.trainer.accelerator))
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        stop(error)
    if is_first:
        write(run, folder, environment, started)
        if repo_id is not None:
            push(folder, repo_id, recipe.training)
    run.trainer.accelerator.wait_for_everyone()
    run.trainer.accelerator.end_training()


def write(run: TrainingRun, folder: Path, environment: dict, started: float) -> None:
    """Complete the model's folder, and tell the user the results and what to do next."""
    record = run.record(command_line(), environment)
    pictures = draw_pictures(folder.parent / "pictures", record.log_history, run.eval_pairs, run.before, run.after)
    write_run_folder(folder, record, pictures)
    print(closing(record, folder, time.time() - started), flush=True)


def push(folder: Path, repo_id: str, arguments: GCLTrainingArguments) -> None:
    """Push the finished folder to the Hub. If that fails, the error names the command that tries again."""
    try:
        url = push_folder(
            folder,
            repo_id,
            private=bool(arguments.hub_private_repo),
            revision=arguments.hub_revision,
            token=arguments.hub_token,
        )
    except (ValueError, ConnectionError) as error:
        stop(ValueError(f"{error}. The model is in {folder}; push it again with: gcl push {folder} {repo_id}"))
    print(f"\nPushed to {url}")


if __name__ == "__main__":
    with failing_together():
        main(sys.argv[1:])
