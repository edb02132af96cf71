"""GR-CLIP's centring (arXiv 2507.19054): the mean embedding of each modality, estimated from pairs."""


def estimate_modality_means(model, processor, pairs, *, batch_size: int = 64, show_progress: bool = False) -> None:
    """Store the means of the pairs' image, text and fused embeddings in the model, which subtracts them once
    `model.config.centring` is on.

    Args:
        model: a `GCLModel` with centring off.
        pairs: sequence of `{"id", "image", "captions"}` for calibration, never the pairs that are searched; the first
            caption of each is used.

    Raises:
        ValueError: no pairs, centring is on already, or an image that can't be read.
    """
    if not len(pairs):
        raise ValueError("there are no pairs to estimate the modality means from")
    if model.config.centring:
        raise ValueError("this model centres its embeddings already: load it with centring=False to estimate new means")
    images = [{"image": pair["image"]} for pair in pairs]
    texts = [{"text": pair["captions"][0]} for pair in pairs]
    fused = [image | text for image, text in zip(images, texts, strict=True)]
    embeds = model.encode([*images, *texts, *fused], processor, batch_size=batch_size, show_progress=show_progress)
    model.set_modality_means(*embeds.split(len(pairs)))
