"""GCLTrainer: transformers' Trainer with a contrastive batch over all processes and the nine-way evaluation.

Notable features:
- the loss is computed on the embeddings of all ranks, with the gradient of one process on the whole batch;
- every step is GradCache's: with `grad_cache_chunk` a batch of any size, without it the plain step, of one chunk;
- the loss of every direction (and cut, with `matryoshka_dims`), 1/τ, the gradient norm and the shares of data, encoder
  and loss in the time are logged;
- embeddings that are not finite stop the run, with the step and what to change;
- `evaluate` runs `evaluation.pairs.measure` instead of a loss over an eval loader.
"""

import logging
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer

from modeling_gcl import alignclip_loss, contrastive_loss, gcl_loss
from modeling_gcl.matryoshka import cuts_and_shares
from universal_gcl.evaluation.pairs.measure import embed_pairs, evaluate_embeddings
from universal_gcl.evaluation.pairs.report import headline_metrics
from universal_gcl.retrieval.adapters import ADAPTER_WEIGHTS, check_adapter_keys, check_adapter_weights
from universal_gcl.training.batch_plan import BatchPlan, accumulation_for, negatives_per_query
from universal_gcl.training.callbacks import (
    BatchSizeCallback,
    BrokenImagesCallback,
    DataEpochCallback,
    LogitScaleCallback,
)
from universal_gcl.training.chunks import widen_texts
from universal_gcl.training.data import BrokenImages
from universal_gcl.training.distributed import Processes, RowShardedEncoder
from universal_gcl.training.gradcache import GradCache
from universal_gcl.training.memory import fit_chunk
from universal_gcl.training.parallelism import check_parallelism
from universal_gcl.training.sharding import SavedClassCallback, prepare_sharding, whole_parameters
from universal_gcl.training.step_timer import StepTimer, StepTimerCallback

logger = logging.getLogger(__name__)

LABELS = ("ids", "caption_ids", "broken")  # of a batch, what is not for the model
MODALITIES = ("image", "text", "fused")


class GCLTrainer(Trainer):
    r"""
    Args:
        As `transformers.Trainer`, with `model` a [`GCLModel`], or one that `add_lora` adapted, `args` a
            [`GCLTrainingArguments`], `train_dataset` a [`PairDataset`],
        `eval_dataset` a sequence of pairs, `data_collator` a [`PairCollator`], `processing_class` a `GCLProcessor`.
        max_broken_share (`float`): share of unreadable images in the training data above which training stops.

    Raises:
        ValueError: several GPUs without a launcher, fewer pairs than one batch, an `effective_batch_size` that can't
            be made up or does not fit in memory, or GradCache with DeepSpeed.
        MemoryError: in training with GradCache, as `GradCache.step` says.
        FloatingPointError: embeddings or the temperature are NaN or infinite.
    """

    def __init__(self, *args, max_broken_share=0.01, **kwargs):
        super().__init__(*args, **kwargs)
        check_parallelism(self.args, self.accelerator, self.model)
        prepare_sharding(self.model, self.accelerator)
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
        self.processes = Processes(self.accelerator.device, half_ring=self.args.half_ring)
        self._cuts = self._matryoshka_cuts()
        self._check_fusion()
        self._check_grad_cache()
        self._chunk_that_fits = None
        self.timer = StepTimer(self.args.device)
        if self.args.effective_batch_size is not None:
            self._fit_effective_batch()
        self.grad_cache = self._build_grad_cache()
        self.current_gradient_accumulation_steps = 1
        self._fetched = []  # the micro-batches of this optimiser step, as Trainer holds them
        self._micro_batches = []  # those of them that wait for the last one
        self._terms = defaultdict(list)  # of the steps since the last log entry
        self._num_steps = 0
        self.add_callback(BatchSizeCallback(self.batch_plan.pairs))
        self.add_callback(DataEpochCallback)
        self.add_callback(LogitScaleCallback)
        self.add_callback(StepTimerCallback(self.timer))
        self.add_callback(SavedClassCallback)
        self.add_callback(BrokenImagesCallback(self))

    def train(self, *args, **kwargs):
        """As Trainer's; figures of an earlier run that were not logged are forgotten."""
        self._terms.clear()
        self._num_steps = 0
        self.timer.pop_shares()
        config = self.accelerator.unwrap_model(self.model).config
        if config.matryoshka_dims and self._cuts is None:
            logger.warning(
                f"the model was trained to be cut to {config.matryoshka_dims} dimensions; this training minds the "
                "whole alone, and the saved model will not name them: see training.matryoshka_dims"
            )
        config.matryoshka_dims = self._cuts
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As Trainer's: the micro-batches of one optimiser step."""
        # Trainer still holds the last step's: with a large batch they take as much memory as the new ones
        self._fetched.clear()
        self._micro_batches.clear()
        self.timer.begin_step()
        with self.timer.measure("data_wait"):
            self._fetched, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._fetched, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. With `grad_cache_chunk` all of an optimiser step's are one batch, done at the last of them;
        before it the result is 0, so that the sum over the step is the batch's loss in both cases."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._micro_batches.append(self._split_labels(self._prepare_inputs(inputs)))
        if self.args.grad_cache_chunk is not None and not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        loss, (terms, logit_scale) = self.grad_cache.step(model, micro_batches)
        for name, term in terms.items():
            self._terms[f"loss_{name}"].append(term / self._loss_divisor)
        self._terms["logit_scale"].append(logit_scale / self._loss_divisor)
        self._num_steps += self.accelerator.sync_gradients
        pairs = sum(len(inputs["input_ids"]) for inputs, _ in micro_batches)
        self.timer.add_pairs(pairs * self.args.world_size)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss / self._loss_divisor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch; training itself goes through `training_step`."""
        inputs, labels = self._split_labels(inputs)
        output = self._forward(model, inputs)
        loss, _ = self.batch_loss(self._embeds(output), output.logit_scale, **labels)
        return (loss, output) if return_outputs else loss

    def batch_loss(self, embeds, logit_scale, ids=None, caption_ids=None):
        """
        The loss of the batch that all processes hold together; nothing else joins them.

        Args:
            embeds (sequence of `torch.Tensor` of shape `(n, D)`): this process's image, text and, for GCL, fused ones.
            logit_scale (`torch.Tensor` scalar): 1/τ.
            ids, caption_ids (`torch.LongTensor` of shape `(n,)`, *optional*): as for `gcl_loss`.

        Returns:
            The loss, the same on every process, and its terms by direction. The mean over the processes of the
            parameters' gradients is the gradient of the loss.

        Raises:
            FloatingPointError: as the class says.
        """
        try:
            return self._loss(*embeds, logit_scale, ids=ids, caption_ids=caption_ids, processes=self.processes)
        except FloatingPointError as error:  # all ranks see the whole batch, so all stop
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: {error}. Lower learning_rate, use bf16 instead of fp16, "
                "or look for broken weights in model.encoder; resume from the last checkpoint."
            ) from error

    def _split_labels(self, inputs):
        """The model's inputs and the labels of the loss that are in use; counts the unreadable images."""
        inputs = dict(inputs)
        labels = {"ids": inputs.pop("ids"), "caption_ids": inputs.pop("caption_ids")}
        self.broken_images.add(inputs.pop("broken"))
        used = {"ids": self.args.mask_equal_ids, "caption_ids": self.args.mask_equal_captions}
        return inputs, {name: values for name, values in labels.items() if used[name]}

    def _forward(self, model, inputs):
        with self.compute_loss_context_manager():
            return model(**inputs, return_loss=False, return_dict=True, modalities=self._modalities)

    @property
    def _modalities(self):
        """What the loss contrasts: only GCL needs fused embeddings."""
        return MODALITIES if self.args.loss == "gcl" else MODALITIES[:2]

    def _embeds(self, output):
        return [output[f"{name}_embeds"] for name in self._modalities]

    def _embed(self, model, inputs):
        output = self._forward(model, inputs)
        return *self._embeds(output), output.logit_scale

    def _build_grad_cache(self):
        def loss(embeds, logit_scale, labels):
            value, terms = self.batch_loss(embeds, logit_scale, **labels)
            return value, (terms, logit_scale.detach())

        def backward(scalar):
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
            exchange=self._exchange,
            sharded=self.is_fsdp_enabled,
            trim_texts=getattr(self.processing_class, "text_padding", None) != "max_length",
            measure=self.timer.measure,
        )

    def _matryoshka_cuts(self):
        """The dimensions that embeddings are trained to be cut to, falling from D; None: D alone."""
        args = self.args
        if args.matryoshka_dims is None:
            return None
        try:
            cuts = cuts_and_shares(args.matryoshka_dims, args.matryoshka_weights, self.model.config.projection_dim)
        except ValueError as error:
            raise ValueError(f"training.{error}") from error
        return sorted(cuts, reverse=True)

    def _check_fusion(self):
        fusion = getattr(self.model, "fusion", None)
        if self.args.loss != "gcl" and fusion is not None and any(p.requires_grad for p in fusion.parameters()):
            raise ValueError(
                f"training.loss={self.args.loss!r} has no fused embeddings, so the gates of "
                f"fusion={self.model.config.fusion!r} would stay untrained: use the loss gcl, or freeze them "
                "(model.freeze: [fusion])"
            )

    def _check_grad_cache(self):
        if self.args.grad_cache_chunk is None and self.args.effective_batch_size is None:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "training.grad_cache_chunk and effective_batch_size don't work with DeepSpeed, whose engine counts "
                "every chunk as a step: use DDP or FSDP, or leave them out"
            )
        if self.args.auto_find_batch_size:
            raise ValueError(
                "training.auto_find_batch_size does nothing with grad_cache_chunk or effective_batch_size, which bound "
                "the memory by the chunk: leave it out"
            )
        norms = [name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)]
        trained = {name.rpartition(".")[0] for name, p in self.model.named_parameters() if p.requires_grad}
        if count := len(trained.intersection(norms)):
            logger.warning(
                f"{count} batch norm layers are trained: with training.grad_cache_chunk they normalise by the "
                "statistics of a chunk, and their running statistics move twice a step"
            )

    def _fit_effective_batch(self):
        """Choose accumulation and chunk for `effective_batch_size`; all processes choose alike."""
        args = self.args
        args.gradient_accumulation_steps = accumulation_for(
            args.effective_batch_size, args.train_batch_size, args.world_size, len(self.train_dataset)
        )
        if args.grad_cache_chunk is not None:
            return
        few = self.data_collator([self.train_dataset[i] for i in range(min(8, len(self.train_dataset)))])
        inputs = widen_texts({n: v for n, v in few.items() if n not in LABELS}, self._most_tokens())

        def embed(model, inputs):
            with self.accelerator.autocast():  # the model is not wrapped yet
                return self._embed(model, inputs)

        self.model.train()
        self._chunk_that_fits = fit_chunk(
            embed, self.model, inputs, self.args.device, args.effective_batch_size, self._exchange
        )
        args.grad_cache_chunk = min(self._chunk_that_fits, args.train_batch_size)

    def _most_tokens(self):
        """The most tokens that a text may have; 0 if that is not known."""
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        limit = getattr(self.processing_class, "max_text_length", None) or getattr(tokenizer, "model_max_length", 0)
        return limit if limit < 1_000_000 else 0  # tokenizers without a limit state 10^30

    @property
    def batch_plan(self):
        """[`BatchPlan`]: what makes up a batch, and the negatives each query sees."""
        args = self.args
        at_once = args.train_batch_size * args.world_size
        pairs = at_once * (1 if args.grad_cache_chunk is None else args.gradient_accumulation_steps)
        return BatchPlan(
            micro_batch=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            chunk=self.grad_cache.chunk_size,
            negatives=negatives_per_query(pairs, args.loss, args.denominator, args.intra_modality),
            # on the CPU larger chunks are no faster
            chunk_that_fits=None if args.device.type == "cpu" else self._chunk_that_fits,
        )

    @property
    def _loss_divisor(self):
        """Micro-batches over which the loss is averaged; with `grad_cache_chunk` they are one batch."""
        return self.current_gradient_accumulation_steps if self.args.grad_cache_chunk is None else 1

    def _exchange(self, number):
        """An integer of every process, in rank order."""
        return self.accelerator.gather(torch.tensor([number], device=self.args.device)).tolist()

    def _loss(self, *embeds_and_scale, **batch):
        batch |= {name: getattr(self.args, name) for name in ("matryoshka_dims", "matryoshka_weights")}
        if self.args.loss == "cl":
            return contrastive_loss(*embeds_and_scale, return_terms=True, **batch)
        if self.args.loss == "alignclip":
            weight = self.args.separation_weight
            return alignclip_loss(*embeds_and_scale, separation_weight=weight, return_terms=True, **batch)
        return gcl_loss(
            *embeds_and_scale,
            denominator=self.args.denominator,
            intra_modality=self.args.intra_modality,
            direction_weights=self.args.direction_weights,
            return_terms=True,
            **batch,
        )

    def get_decay_parameter_names(self, model):
        """As Trainer's, without the temperature: decay would pull 1/τ towards 1."""
        return [name for name in super().get_decay_parameter_names(model) if "logit_scale" not in name]

    def log(self, logs, *args, **kwargs):
        """As Trainer's, with the means since the last entry of each term of the loss and of 1/τ, and `StepTimer`'s."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).sum().item() / self._num_steps for name, values in self._terms.items()}
            logs |= self.timer.pop_shares()
            self._terms.clear()
            self._num_steps = 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """As Trainer's; an adapter is read back, since peft may leave out what a name does not match."""
        super()._save(output_dir, state_dict)
        if self._has_adapter and self.args.should_save:  # other ranks come here too, before the file is written
            check_adapter_weights(output_dir or self.args.output_dir, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As Trainer's, which would go on from the base model where a checkpoint holds no adapter, or not all of it."""
        holds_adapter = (Path(resume_from_checkpoint) / ADAPTER_WEIGHTS).is_file()
        if holds_adapter != self._has_adapter:
            raise ValueError(
                f"{resume_from_checkpoint} was trained {'with' if holds_adapter else 'without'} LoRA: resume it "
                f"{'with its' if holds_adapter else 'without a'} peft: section in the recipe"
            )
        if holds_adapter:
            check_adapter_keys(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if holds_adapter:
            check_adapter_weights(resume_from_checkpoint, self.model)

    @property
    def _has_adapter(self):
        return hasattr(self.model, "peft_config")

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
        with whole_parameters(model, self.accelerator):
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
