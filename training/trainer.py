"""GCLTrainer: transformers' Trainer with a contrastive batch over all processes and the nine-way evaluation.

Notable features:
- the loss is computed on the embeddings of all ranks, with the gradient of one process on the whole batch;
- the loss of every direction, 1/τ and the gradient norm are logged;
- embeddings that are not finite stop the run, with the step and what to change;
- `evaluate` runs `evaluation.pairs` instead of a loss over an eval loader.
"""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from transformers import Trainer

from evaluation.pairs import embed_pairs, evaluate_embeddings
from modeling_gcl import alignclip_loss, contrastive_loss, gcl_loss

from .callbacks import BrokenImagesCallback, DataEpochCallback, LogitScaleCallback
from .data import BrokenImages
from .distributed import Processes, RowShardedEncoder


class GCLTrainer(Trainer):
    r"""
    Args:
        As `transformers.Trainer`, with `args` a [`GCLTrainingArguments`], `train_dataset` a [`PairDataset`],
        `eval_dataset` a sequence of pairs, `data_collator` a [`PairCollator`], `processing_class` a `GCLProcessor`.
        max_broken_share (`float`): share of unreadable images in the training data above which training stops.

    Raises:
        ValueError: several GPUs without a launcher, or fewer pairs than one batch.
        FloatingPointError: embeddings or the temperature are NaN or infinite.
    """

    # the loss of a micro-batch is a mean: accumulation must divide it, whatever the model's signature suggests
    loss_is_scaled_for_ga = False

    def __init__(self, *args, max_broken_share=0.01, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Launch one process per GPU: "
                f"accelerate launch --num_processes {self.args.n_gpu} train.py ... (or set CUDA_VISIBLE_DEVICES=0)"
            )
        if (
            self.train_dataset is not None
            and len(self.train_dataset) < self.args.train_batch_size * self.args.world_size
        ):
            raise ValueError(
                f"{len(self.train_dataset)} pairs are fewer than one batch "
                f"({self.args.train_batch_size} x {self.args.world_size} processes): lower per_device_train_batch_size"
            )
        self.args.eval_on_start = self.args.eval_on_start and self.eval_dataset is not None
        self.broken_images = BrokenImages(len(self.train_dataset or ()), max_broken_share)
        self.processes = Processes(self.accelerator.device)
        self._terms = defaultdict(list)  # since the last log entry
        self.add_callback(DataEpochCallback)
        self.add_callback(LogitScaleCallback)
        self.add_callback(BrokenImagesCallback(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        ids, caption_ids = inputs.pop("ids"), inputs.pop("caption_ids")
        self.broken_images.add(inputs.pop("broken"))
        output = model(**inputs, return_loss=False, return_dict=True)
        embeds = [output[name] for name in ("image_embeds", "text_embeds", "fused_embeds")]
        ids = ids if self.args.mask_equal_ids else None
        caption_ids = caption_ids if self.args.mask_equal_captions else None
        try:
            loss, terms = self._loss(*embeds, output.logit_scale, ids=ids, caption_ids=caption_ids)
        except FloatingPointError as error:  # all ranks see the whole batch, so all stop
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: {error}. Lower learning_rate, use bf16 instead of fp16, "
                "or look for broken weights in model.encoder; resume from the last checkpoint."
            ) from error
        if model.training:
            for name, term in terms.items():
                self._terms[f"loss_{name}".replace("->", "→")].append(term)
            self._terms["logit_scale"].append(output.logit_scale.detach())
        return (loss, output) if return_outputs else loss

    def _loss(self, image_embeds, text_embeds, fused_embeds, logit_scale, **labels):
        labels["processes"] = self.processes
        if self.args.loss == "cl":
            return contrastive_loss(image_embeds, text_embeds, logit_scale, return_terms=True, **labels)
        if self.args.loss == "alignclip":
            weight = self.args.separation_weight
            return alignclip_loss(
                image_embeds, text_embeds, logit_scale, separation_weight=weight, return_terms=True, **labels
            )
        return gcl_loss(
            image_embeds,
            text_embeds,
            fused_embeds,
            logit_scale,
            denominator=self.args.denominator,
            intra_modality=self.args.intra_modality,
            direction_weights=self.args.direction_weights,
            return_terms=True,
            **labels,
        )

    def get_decay_parameter_names(self, model):
        """As Trainer's, without the temperature: decay would pull 1/τ towards 1."""
        return [name for name in super().get_decay_parameter_names(model) if "logit_scale" not in name]

    def log(self, logs, *args, **kwargs):
        """As Trainer's, with the means since the last entry of each direction's loss and of 1/τ."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def gather_broken_images(self):
        """Names of the unreadable images that any process met, each once; every process must call it.

        Raises:
            DataError: they are more than `max_broken_share` of the training data.
        """
        self.broken_images.merge(gather_object(self.broken_images.names))
        return self.broken_images.names

    def embed_eval_pairs(self, eval_dataset=None):
        """[`PairEmbeddings`] of the evaluation pairs, embedded by all processes together."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        return embed_pairs(
            RowShardedEncoder(model),
            self.processing_class,
            pairs,
            batch_size=self.args.per_device_eval_batch_size,
            show_progress=not self.args.disable_tqdm,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The nine-way evaluation; logs and returns its headline, mixed and gap figures under `metric_key_prefix`."""
        result = evaluate_embeddings(self.embed_eval_pairs(eval_dataset), seed=self.args.eval_seed)
        metrics = headline_metrics(result, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def headline_metrics(result, prefix="eval"):
    """The figures of a nine-way result worth a curve: headline hit@10, mixed nDCG@10, cosines of modality means.

    Figures that too few captions leave without a value (None) are left out."""
    metrics = {f"{prefix}_headline_{name}": value for name, value in result["headline"].items()}
    metrics[f"{prefix}_mixed_ndcg@10"] = result["mixed"]["ndcg@10"]
    metrics |= {f"{prefix}_cosine_{pair}": value for pair, value in result["gap"]["cosine"].items()}
    return {name: value for name, value in metrics.items() if value is not None}
