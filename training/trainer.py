"""GCLTrainer: transformers' Trainer with a contrastive batch over all processes and the nine-way evaluation.

Notable features:
- every loss comes from `compute_loss`, which gets the embeddings of the whole batch and can be overridden;
- the loss compares the embeddings of all ranks, and its gradient is that of one process on the whole batch;
- every step is a GradCache step: with `grad_cache_chunk` for a batch of any size, without it with a single chunk;
- the log has the loss of each direction (and cut, with `matryoshka_dims`), 1/τ, the gradient norm, and how much of the
  time data, encoder and loss take;
- embeddings that are not finite stop the run, with the step and what to change;
- `evaluate` runs `evaluation.pairs.measure` instead of computing a loss.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn

from modeling_gcl.modalities import FEATURES
from modeling_gcl.modeling_gcl import GCLOutput
from universal_gcl.evaluation.pairs.measure import embed_pairs, evaluate_embeddings
from universal_gcl.evaluation.pairs.report import headline_metrics
from universal_gcl.training.batch_plan import BatchPlan, accumulation_for
from universal_gcl.training.callbacks import (
    BatchSizeCallback,
    BrokenImagesCallback,
    DataEpochCallback,
    LogitScaleCallback,
)
from universal_gcl.training.checks import (
    check_enough_pairs,
    check_fusion,
    check_grad_cache,
    matryoshka_cuts,
    record_cuts,
)
from universal_gcl.training.chunks import widen_texts
from universal_gcl.training.data import BrokenImages
from universal_gcl.training.distributed import BatchProcesses, RowShardedEncoder
from universal_gcl.training.gradcache import GradCache
from universal_gcl.training.logged_terms import LoggedTerms
from universal_gcl.training.loss_parameters import LossParameters
from universal_gcl.training.losses.loss import LossFunction
from universal_gcl.training.memory import fit_chunk
from universal_gcl.training.parallelism import check_parallelism
from universal_gcl.training.parameter_trainer import ParameterTrainer
from universal_gcl.training.sharding import SavedClassCallback, prepare_sharding, whole_parameters
from universal_gcl.training.step_timer import StepTimer, StepTimerCallback

LABELS = ("ids", "caption_ids", "broken")  # what a batch holds besides the model's inputs
MODALITIES = tuple(FEATURES.values())
NOT_FINITE_REMEDY = (
    "Lower learning_rate, use bf16 instead of fp16, or look for broken weights in model.encoder; resume from the last "
    "checkpoint."
)


class GCLTrainer(ParameterTrainer):
    r"""
    `transformers.Trainer` for contrastive training of a `GCLModel`.

    To train with a loss of your own, give it as `loss`, or override `compute_loss`, which computes every loss in
    training, with GradCache or without, in one process or several. Both get the embeddings (not pixels and tokens) of
    all pairs that this process has in the batch:

        >>> import torch
        >>> from universal_gcl.training.trainer import GCLTrainer
        >>> class UniformTrainer(GCLTrainer):
        ...     '''The chosen loss, and a term that spreads the image embeddings (Wang & Isola, 2020).'''
        ...
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        ...         images = self.processes.gather(outputs.image_embeds)  # of all processes, with gradient
        ...         loss = loss + 0.1 * torch.pdist(images).square().mul(-2).exp().mean().log()
        ...         return (loss, outputs) if return_outputs else loss
        >>> class SigmoidLoss(torch.nn.Module):
        ...     '''SigLIP's loss. Its bias is trained with the model, and saved in checkpoints.'''
        ...
        ...     modalities = ("image", "text")  # fused embeddings are not computed
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bias = torch.nn.Parameter(torch.tensor(-10.0))
        ...
        ...     def forward(self, image_embeds, text_embeds, logit_scale, processes, **labels):
        ...         images, texts = processes.gather(image_embeds), processes.gather(text_embeds)
        ...         logits = logit_scale * images @ texts.T + self.bias
        ...         signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        ...         return -torch.nn.functional.logsigmoid(signs * logits).sum(1).mean()

    Use them as `UniformTrainer(model=model, args=args, ...)` and `GCLTrainer(loss=SigmoidLoss(), model=model, ...)`.
    Training minimises the mean of the losses of all processes. `BatchProcesses.gather`, and the losses of
    `training.losses`, give every process the loss of the whole batch.

    Args:
        *args, **kwargs: the arguments of `transformers.Trainer`. `model` is a [`GCLModel`], adapted by `add_lora` or
            not; `args` a [`GCLTrainingArguments`]; `train_dataset` a [`PairDataset`]; `eval_dataset` a sequence of
            pairs; `data_collator` a [`PairCollator`]; `processing_class` a `GCLProcessor`.
        loss (`Loss`, `nn.Module` or other callable, *optional*): the loss, in place of the one that `args.loss` names.
            It is called with the keywords of `Loss.__call__`, and returns a scalar, or a scalar and a dict of scalars
            to log. Its `modalities` say which embeddings it needs (by default all three). A module's parameters are
            trained with the model, under DDP too, but not under FSDP2 or DeepSpeed.
        max_broken_share (`float`): training stops if more than this share of the training images can't be read.

    Raises:
        ValueError: several GPUs without a launcher; fewer pairs than one batch; an `effective_batch_size` that is not a
            multiple of what is loaded at a time, or does not fit in memory; GradCache with DeepSpeed; a loss with
            parameters under FSDP2 or DeepSpeed; in training, a loss that depends on a parameter which is not trained.
        MemoryError: in training with GradCache; see `GradCache.step`.
        FloatingPointError: embeddings, the temperature or the logged loss are NaN or infinite.
    """

    def __init__(
        self, *args: Any, loss: LossFunction | None = None, max_broken_share: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                "GCLTrainer doesn't call compute_loss_func: give the loss as GCLTrainer(loss=...), or override "
                "compute_loss"
            )
        check_parallelism(self.args, self.accelerator, self.model)
        prepare_sharding(self.model, self.accelerator)
        if self.train_dataset is not None:
            check_enough_pairs(self.args, len(self.train_dataset))
        self.args.eval_on_start = self.args.eval_on_start and self.eval_dataset is not None
        self.broken_images = BrokenImages(len(self.train_dataset or ()), max_broken_share)
        self.processes = BatchProcesses(self.accelerator.device, half_ring=self.args.half_ring)
        self.loss: LossFunction = self.args.make_loss() if loss is None else loss
        self.loss_parameters = LossParameters(self.loss, self.accelerator)
        self._modalities: tuple[str, ...] = tuple(getattr(self.loss, "modalities", MODALITIES))
        self._cuts = matryoshka_cuts(self.args, self.model.config.projection_dim)
        check_fusion(self.model, getattr(self.loss, "name", type(self.loss).__name__), self._modalities)
        check_grad_cache(self.args, self.model, self.is_deepspeed_enabled)
        self._chunk_that_fits: int | None = None
        self.timer = StepTimer(self.args.device)
        if self.args.effective_batch_size is not None:
            self._fit_effective_batch(self.args.effective_batch_size)
        self.grad_cache = self._build_grad_cache()
        self.current_gradient_accumulation_steps = 1
        self._fetched: list = []  # the micro-batches of this optimiser step, as Trainer holds them
        self._micro_batches: list = []  # those that wait for the last one
        self._batch_terms: dict[str, torch.Tensor] = {}  # of the last batch that `compute_loss` was given
        self._logged_terms = LoggedTerms()
        self.add_callback(BatchSizeCallback(self.batch_plan.pairs))
        self.add_callback(DataEpochCallback)
        self.add_callback(LogitScaleCallback)
        self.add_callback(StepTimerCallback(self.timer))
        self.add_callback(SavedClassCallback)
        self.add_callback(BrokenImagesCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The same as Trainer's. Figures of an earlier run that were not logged are dropped."""
        self._logged_terms.clear()
        self.timer.pop_shares()
        self.loss_parameters.start()
        record_cuts(self.accelerator.unwrap_model(self.model).config, self._cuts)
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one optimiser step."""
        # Trainer still holds those of the last step, which in a large batch take as much memory as the new ones
        self._fetched.clear()
        self._micro_batches.clear()
        self.loss_parameters.clear_gradients()
        self.timer.begin_step()
        with self.timer.measure("data_wait"):
            self._fetched, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._fetched, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One micro-batch. With `grad_cache_chunk`, the micro-batches of an optimiser step are one batch, computed with
        the last of them. The others return 0, so that the sum over the step is the loss of the batch."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._micro_batches.append(self._split_labels(self._prepare_inputs(inputs)))
        if self.args.grad_cache_chunk is not None and not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        loss, (terms, logit_scale) = self.grad_cache.step(model, micro_batches)
        if self.accelerator.sync_gradients:
            self.loss_parameters.average_gradients()
        ends_step = self.accelerator.sync_gradients
        self._logged_terms.add(terms, logit_scale, num_batches=self._loss_divisor, ends_step=ends_step)
        pairs = sum(len(inputs["input_ids"]) for inputs, _ in micro_batches)
        self.timer.add_pairs(pairs * self.args.world_size)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss / self._loss_divisor

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, GCLOutput]:
        """
        The loss of one contrastive batch. Every loss comes from here; see the class for how to override it.

        Args:
            model (`nn.Module`): the model, as Trainer has wrapped it.
            inputs (`dict[str, torch.Tensor]`): tensors for the pairs that this process has in the batch (with
                GradCache, the pairs of all chunks and micro-batches): `image_embeds`, `text_embeds` and, if the loss
                needs them, `fused_embeds`, each of shape `(n, D)`, of unit norm, in float32 (or float64);
                `logit_scale`, the scalar 1/τ; `ids` and `caption_ids`, each of shape `(n,)`, unless `mask_equal_ids` or
                `mask_equal_captions` is off. `embed_batch` makes them from a batch of the collator.
            return_outputs (`bool`): also return a [`GCLOutput`] with the embeddings and the scale.
            num_items_in_batch: not used.

        Returns:
            The scalar loss, with gradient. Its terms are logged.

        Raises:
            FloatingPointError: see the class.
        """
        if "logit_scale" not in inputs:
            raise ValueError(
                f"compute_loss takes embeddings and logit_scale, but was given {', '.join(inputs)}: make them with "
                "GCLTrainer.embed_batch(model, inputs)"
            )
        dims = ("matryoshka_dims", "matryoshka_weights")
        more = {} if self._cuts is None else {name: getattr(self.args, name) for name in dims}
        try:
            result = self.loss(**inputs, **more, processes=self.processes)
        except FloatingPointError as error:  # all ranks see the whole batch, so all stop
            raise FloatingPointError(f"step {self.state.global_step + 1}: {error}. {NOT_FINITE_REMEDY}") from error
        loss, terms = result if isinstance(result, tuple) else (result, {})
        self._batch_terms = {name: torch.as_tensor(term).detach() for name, term in terms.items()}
        if not return_outputs:
            return loss
        embeds: dict[str, Any] = {name: x for name, x in inputs.items() if name not in LABELS}
        return loss, GCLOutput(loss=loss, **embeds)

    def embed_batch(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The `inputs` of `compute_loss` for a batch as the collator makes it."""
        inputs, labels = self._split_labels(self._prepare_inputs(inputs))
        *embeds, logit_scale = self._embed(model, inputs)
        return self._loss_inputs(embeds, logit_scale, labels)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """The same as Trainer's, with embeddings for `compute_loss`."""
        with torch.no_grad():
            inputs = self.embed_batch(model, inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _split_labels(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The model's inputs, and those labels of the loss that are used. Counts the unreadable images."""
        inputs = dict(inputs)
        labels = {"ids": inputs.pop("ids"), "caption_ids": inputs.pop("caption_ids")}
        self.broken_images.add(inputs.pop("broken"))
        used = {"ids": self.args.mask_equal_ids, "caption_ids": self.args.mask_equal_captions}
        return inputs, {name: values for name, values in labels.items() if used[name]}

    def _embed(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self.compute_loss_context_manager():
            output = model(**inputs, return_loss=False, return_dict=True, modalities=self._modalities)
        return *(output[f"{name}_embeds"] for name in self._modalities), output.logit_scale

    def _loss_inputs(
        self, embeds: Sequence[torch.Tensor], logit_scale: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        named = {f"{name}_embeds": x for name, x in zip(self._modalities, embeds)}
        return named | {"logit_scale": logit_scale} | labels

    def _build_grad_cache(self) -> GradCache:
        def loss(embeds: Sequence[torch.Tensor], logit_scale: torch.Tensor, labels: dict[str, torch.Tensor]) -> tuple:
            self._batch_terms = {}  # an override may not call the loss that sets them
            value = self.compute_loss(self.model_wrapped, self._loss_inputs(embeds, logit_scale, labels))
            return value, (self._batch_terms, logit_scale.detach())

        def backward(scalar: torch.Tensor) -> None:
            # DeepSpeed would divide by the accumulation steps once more
            deepspeed = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
            self.accelerator.backward(scalar / self._loss_divisor, **deepspeed)

        return GradCache(
            self._embed,
            loss,
            backward,
            device=self.args.device,
            chunk_size=self.args.grad_cache_chunk,
            no_sync=self.accelerator.no_sync,
            exchange=self.processes.exchange,
            sharded=self.is_fsdp_enabled,
            trim_texts=getattr(self.processing_class, "text_padding", None) != "max_length",
            measure=self.timer.measure,
            loss_parameters=self.loss_parameters.trained,
        )

    def _fit_effective_batch(self, size: int) -> None:
        """Choose accumulation and chunk size for an effective batch of `size` pairs. All processes choose the same."""
        args, num_pairs = self.args, len(self.train_dataset)
        args.gradient_accumulation_steps = accumulation_for(size, args.train_batch_size, args.world_size, num_pairs)
        if args.grad_cache_chunk is not None:
            return
        few = self.data_collator([self.train_dataset[i] for i in range(min(8, num_pairs))])
        longest = getattr(self.processing_class, "max_tokens", None) or 0
        inputs = widen_texts({n: v for n, v in few.items() if n not in LABELS}, longest)

        def embed(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            with self.accelerator.autocast():  # the model is not wrapped yet
                return self._embed(model, inputs)

        self.model.train()
        self._chunk_that_fits = fit_chunk(embed, self.model, inputs, args.device, size, self.processes.exchange)
        args.grad_cache_chunk = min(self._chunk_that_fits, args.train_batch_size)

    @property
    def batch_plan(self) -> BatchPlan:
        """[`BatchPlan`]: what a batch consists of, and how many negatives each query gets."""
        args = self.args
        at_once = args.train_batch_size * args.world_size
        pairs = at_once * (1 if args.grad_cache_chunk is None else args.gradient_accumulation_steps)
        negatives = getattr(self.loss, "negatives_per_query", None)
        return BatchPlan(
            micro_batch=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            chunk=self.grad_cache.chunk_size,
            negatives=None if negatives is None else negatives(pairs),
            # on the CPU larger chunks are no faster
            chunk_that_fits=None if args.device.type == "cpu" else self._chunk_that_fits,
        )

    @property
    def _loss_divisor(self) -> int:
        """Number of micro-batches that the loss is averaged over; with `grad_cache_chunk` they are one batch."""
        return self.current_gradient_accumulation_steps if self.args.grad_cache_chunk is None else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The same as Trainer's, with the means of the loss's terms and of 1/τ since the last entry, and the figures of
        `StepTimer`.

        Raises:
            FloatingPointError: the loss is NaN or infinite; all processes log the same mean.
        """
        if "loss" in logs:
            logs |= self._logged_terms.pop_means() | self.timer.pop_shares()
        super().log(logs, *args, **kwargs)
        if not math.isfinite(logs.get("loss", 0.0)):  # the losses of modeling_gcl raise earlier, others don't
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss since the last log entry is {logs['loss']}. "
                f"{NOT_FINITE_REMEDY}"
            )

    def gather_broken_images(self) -> list[str]:
        """Names of the unreadable images that any process met, each once; every process must call it.

        Raises:
            DataError: they are more than `max_broken_share` of the training data.
        """
        self.broken_images.merge(gather_object(self.broken_images.names))
        return self.broken_images.names

    def embed_eval_pairs(self, eval_dataset: Sequence[dict] | None = None) -> Any:
        """[`PairEmbeddings`] of the evaluation pairs, embedded by all processes together."""
        pairs: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        with whole_parameters(model, self.accelerator):
            return embed_pairs(
                RowShardedEncoder(model),
                self.processing_class,
                pairs,
                batch_size=self.args.per_device_eval_batch_size,
                show_progress=not self.args.disable_tqdm,
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The nine-way evaluation of `eval_dataset`, a sequence of pairs. Logs and returns its headline, mixed and gap
        figures under `metric_key_prefix`."""
        result = evaluate_embeddings(self.embed_eval_pairs(eval_dataset), seed=self.args.eval_seed)
        metrics = headline_metrics(result, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
