"""GCLTrainer: what it optimises, logs, repeats, resumes, evaluates and refuses."""

import pytest
import torch

from modeling_gcl import GCLModel, contrastive_loss, gcl_loss
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.training_runs import CHECKPOINTING, make_pairs, make_trainer
from universal_gcl.evaluation.pairs.measure import evaluate_pairs
from universal_gcl.sources.checks import DataError
from universal_gcl.training.data import PairCollator
from universal_gcl.training.freezing import freeze_parts


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def loss_of(trainer, batch):
    return trainer.compute_loss(trainer.model, trainer.embed_batch(trainer.model, batch))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "gcl"},
        {"loss": "gcl", "denominator": "without_other_positive", "direction_weights": {"i→it": 0.25}},
        {"loss": "gcl", "intra_modality": False},
        {"loss": "gcl", "matryoshka_dims": [12, 6], "matryoshka_weights": [1.0, 0.5]},
        {"loss": "cl"},
        {"loss": "cl", "matryoshka_dims": [6]},
    ],
)
def test_the_loss_is_the_one_asked_for(tmp_path, settings):
    trainer = make_trainer(tmp_path, **settings)
    trainer.model.eval()
    batch = batch_of(trainer)
    embeds = trainer.model(**{k: v for k, v in batch.items() if k not in ("ids", "caption_ids", "broken")})
    labels = {"ids": batch["ids"], "caption_ids": batch["caption_ids"]}
    options = {name: value for name, value in settings.items() if name != "loss"}
    if settings["loss"] == "cl":
        expected = contrastive_loss(embeds.image_embeds, embeds.text_embeds, embeds.logit_scale, **labels, **options)
    else:
        triple = (embeds.image_embeds, embeds.text_embeds, embeds.fused_embeds)
        expected = gcl_loss(*triple, embeds.logit_scale, **labels, **options)
    assert loss_of(trainer, batch).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", ["gcl", "cl", "alignclip"])
def test_fused_embeddings_are_computed_for_gcl_only(tmp_path, loss):
    trainer = make_trainer(tmp_path, loss=loss, max_steps=1)
    calls = []
    trainer.model.fusion.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert bool(calls) == (loss == "gcl")


def test_gates_are_trained_alone_and_refused_where_they_would_not_be(tmp_path):
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum")
    freeze_parts(model, ["image", "text", "logit_scale"])
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=6, learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("fusion.")}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"loss='cl' has no fused embeddings.*freeze: \[fusion\]"):
        make_trainer(tmp_path, model=GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum"), loss="cl")
    freeze_parts(model := GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum"), ["fusion"])
    make_trainer(tmp_path, model=model, loss="cl", max_steps=1).train()


def test_equal_captions_and_ids_are_masked_only_when_asked(tmp_path):
    pairs = make_pairs(8)
    for pair in pairs:
        pair["captions"] = ["a dog"]
    for masked in (True, False):
        trainer = make_trainer(tmp_path, pairs, mask_equal_captions=masked)
        trainer.model.eval()
        batch = batch_of(trainer)
        output = trainer.model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        triple = (output.image_embeds, output.text_embeds, output.fused_embeds)
        one_by_one = [gcl_loss(*(x[j : j + 1] for x in triple), output.logit_scale).item() for j in range(8)]
        loss = loss_of(trainer, batch).item()
        if masked:  # equal captions leave no negatives: each pair as if it were alone
            assert loss == pytest.approx(sum(one_by_one) / 8, rel=1e-5)
        else:
            assert loss == pytest.approx(output.loss.item()) and loss > sum(one_by_one) / 8 + 1


def test_training_lowers_the_loss_and_logs_every_direction(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=6)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["loss"] < entries[0]["loss"]
    directions = {"loss_i→t", "loss_t→i", "loss_i→it", "loss_it→i", "loss_t→it", "loss_it→t"}
    for entry in entries:
        assert directions | {"logit_scale", "grad_norm"} <= entry.keys()
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in directions) / 6, rel=1e-4)


def test_a_seed_repeats_a_run_and_another_differs(tmp_path):
    runs = []
    for seed in (3, 3, 4):
        trainer = make_trainer(tmp_path, seed=seed, dataloader_num_workers=2 if len(runs) == 1 else 0)
        trainer.train()
        runs.append(weights(trainer))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    whole = make_trainer(tmp_path / "whole", optim="adamw_torch", learning_rate=1e-3)
    whole.train()
    first = make_trainer(
        tmp_path / "part", optim="adamw_torch", learning_rate=1e-3, save_strategy="steps", save_steps=4
    )
    first.train()  # 12 steps, checkpoints at 4, 8 and 12, the last two kept
    second = make_trainer(tmp_path / "part", optim="adamw_torch", learning_rate=1e-3)
    second.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-8"))
    assert second.state.global_step == whole.state.global_step == 12
    resumed = weights(second)
    for name, parameter in weights(whole).items():
        torch.testing.assert_close(parameter, resumed[name], atol=1e-6, rtol=1e-5, msg=name)


def test_another_caption_is_drawn_in_each_epoch(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=3)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda items: (seen.append({i["pair_id"]: i["text"] for i in items}), collate(items))[1]
    trainer.train()
    epochs = [dict(pair for batch in seen[start : start + 6] for pair in batch.items()) for start in (0, 6, 12)]
    assert [len(epoch) for epoch in epochs] == [48, 48, 48]
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_temperature_is_trained_clamped_and_never_decayed(tmp_path):
    model = GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=10.0, max_logit_scale=10.001)
    trainer = make_trainer(tmp_path, model=model, loss="cl", learning_rate=1.0)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed and not any("logit_scale" in name for name in decayed)
    trainer.train()
    assert model.logit_scale.log_scale.item() <= model.logit_scale.maximum
    assert model.logit_scale.log_scale.item() != pytest.approx(torch.tensor(10.0).log().item(), abs=1e-6)


def test_gradient_accumulation_averages_micro_batches(tmp_path):
    """Two micro-batches of 8: the step's gradient is the mean of theirs (accumulation adds no negatives)."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.5)
    start = weights(trainer)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda items: batches.append(collate(items)) or batches[-1]
    trainer.train()
    end = weights(trainer)
    reference = make_trainer(tmp_path)
    reference.model.load_state_dict(start, strict=False)
    reference.model.train()
    sum(loss_of(reference, batch) / 2 for batch in batches[:2]).backward()
    for name, parameter in reference.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(end[name], start[name] - 0.5 * parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_evaluate_is_the_nine_way_protocol(tmp_path):
    pairs = make_pairs(12, seed=5)
    trainer = make_trainer(tmp_path, eval_pairs=pairs, eval_strategy="epoch")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_headline_global" in entry]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]  # at the start, and after each epoch
    expected = evaluate_pairs(trainer.model, tiny_processor("clip"), pairs)
    assert entries[-1]["eval_headline_global"] == expected["headline"]["global"]
    assert entries[-1]["eval_mixed_ndcg@10"] == expected["mixed"]["ndcg@10"]
    assert entries[-1]["eval_cosine_i,t"] == expected["gap"]["cosine"]["i,t"]
    one_caption = [pair | {"captions": pair["captions"][:1]} for pair in pairs]
    assert "eval_mixed_ndcg@10" not in trainer.evaluate(one_caption)


def test_checkpoints_hold_model_and_processor(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = GCLModel.from_pretrained(tmp_path / "saved")
    rows = ["a red dog", {"image": make_pairs(1)[0]["image"]}]
    processor = type(trainer.processing_class).from_pretrained(tmp_path / "saved")
    # Trainer copies the tokenizer's special ids into the config: the embeddings must not move
    torch.testing.assert_close(
        loaded.encode(rows, processor), trainer.model.encode(rows, trainer.processing_class), atol=1e-6, rtol=0
    )


def test_embeddings_that_are_not_finite_stop_the_run(tmp_path):
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    with torch.no_grad():
        model.encoder.text_projection.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 1: text_embeds holds NaN .*Lower learning_rate"):
        make_trainer(tmp_path, model=model).train()


def test_broken_images_are_skipped_counted_and_fatal_over_the_share(tmp_path):
    pairs = make_pairs(48)
    pairs[7]["image"] = b"broken"
    trainer = make_trainer(tmp_path, pairs, max_broken_share=0.05)
    trainer.train()
    assert len(trainer.gather_broken_images()) == 1 and "pair 7" in trainer.gather_broken_images()[0]
    with pytest.raises(DataError, match="1 of 48 images could not be read.*pair 7.*over data.max_broken_share"):
        make_trainer(tmp_path, pairs, max_broken_share=0.01).train()


def test_fewer_pairs_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="6 pairs are fewer than one batch .*lower per_device_train_batch_size"):
        make_trainer(tmp_path, make_pairs(6))


def test_bf16_and_gradient_checkpointing_train(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, num_train_epochs=1, **{CHECKPOINTING: True})
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert trainer.state.log_history[-1]["train_loss"] < 5


def test_figures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, report_to="tensorboard", num_train_epochs=1, eval_pairs=make_pairs(12))
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*"))))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_i→t", "train/logit_scale", "train/grad_norm"} <= tags
    assert "eval/headline_global" in tags


def test_a_checkpoint_is_resumed_with_the_same_batch_and_steps_to_go(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    checkpoint = str(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="trained with 8 pairs a step and can't be resumed with 16"):
        make_trainer(tmp_path, per_device_train_batch_size=16).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="and can't be resumed with 16"):
        make_trainer(tmp_path, effective_batch_size=16).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="nothing is left to train: the checkpoint is at step 6 of 6"):
        make_trainer(tmp_path, num_train_epochs=1).train(resume_from_checkpoint=checkpoint)
    resumed = make_trainer(tmp_path, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12


@pytest.mark.parametrize("chunk", [None, 4])
def test_logged_terms_make_up_the_logged_loss(chunk, tmp_path):
    """Over several steps, a smaller last group, and a second run after steps that were not logged."""
    trainer = make_trainer(
        tmp_path, make_pairs(64), gradient_accumulation_steps=3, num_train_epochs=1, logging_steps=2,
        grad_cache_chunk=chunk, logging_first_step=False, learning_rate=1e-4,
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert entries and trainer.state.global_step == 3
        for entry in entries:
            terms = [value for name, value in entry.items() if name.startswith("loss_")]
            assert len(terms) == 6 and entry["loss"] == pytest.approx(sum(terms) / 6, rel=1e-3)
            assert entry["logit_scale"] == pytest.approx(10.0, rel=1e-2)
        assert entries[0]["pairs_per_second"] > 0


@pytest.mark.parametrize("loss", ["gcl", "cl", "alignclip"])
def test_every_trained_parameter_gets_a_gradient(loss, backbone, tmp_path):
    """DistributedDataParallel is not asked to look for those without."""
    trainer = make_trainer(tmp_path, model=GCLModel.from_encoder(tiny_encoder(backbone)), loss=loss)
    trainer.data_collator = PairCollator(tiny_processor(backbone))
    loss_of(trainer, batch_of(trainer)).backward()
    assert not [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]


def test_auto_find_batch_size_is_refused_with_chunks(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size does nothing with grad_cache_chunk"):
        make_trainer(tmp_path, auto_find_batch_size=True, grad_cache_chunk=4)


def test_matryoshka_is_logged_recorded_and_forgotten(tmp_path, caplog):
    """Each cut's loss is logged, the saved model names the cuts, and later training without them says so."""
    trainer = make_trainer(tmp_path, num_train_epochs=1, matryoshka_dims=[6, 12], matryoshka_weights=[2.0, 1.0])
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        cuts = entry["loss_dim_24"], entry["loss_dim_12"], entry["loss_dim_6"]
        assert entry["loss"] == pytest.approx((cuts[0] + cuts[1] + 2 * cuts[2]) / 4, rel=1e-4)
        directions = [value for name, value in entry.items() if "→" in name]
        assert len(directions) == 6 and entry["loss"] == pytest.approx(sum(directions) / 6, rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    model = GCLModel.from_pretrained(tmp_path / "saved")
    assert model.config.matryoshka_dims == [24, 12, 6]
    plain = make_trainer(tmp_path, model=model, num_train_epochs=1)
    assert plain.model.config.matryoshka_dims == [24, 12, 6]
    plain.train()
    assert "was trained to be cut to [24, 12, 6] dimensions" in caplog.text
    assert plain.model.config.matryoshka_dims is None


def test_cuts_beyond_the_embeddings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="training.matryoshka_dims holds 48: use whole numbers from 1 to .* 24"):
        make_trainer(tmp_path, matryoshka_dims=[48, 24])
