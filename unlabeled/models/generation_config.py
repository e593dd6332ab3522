"""Generation configurations that can be saved again."""

from transformers import PreTrainedModel

from unlabeled.errors import UserError


def repair_generation_config(model: PreTrainedModel, name_or_path: str) -> str | None:
    """Make the model's generation config valid, so that it can be saved.

    Many published models set `temperature` or `top_p` without `do_sample`. transformers loads them, and refuses to
    save them as soon as anything in the config has changed, which is at the first checkpoint.

    Args:
        model: its `generation_config` is changed in place.
        name_or_path: where it was loaded from, for the messages.

    Returns:
        A sentence for the log if the config was repaired, otherwise None.

    Raises:
        UserError: the config has another defect.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return None
    if model.config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = model.config.decoder_start_token_id  # `generate` reads only its own config
    try:
        config.validate(strict=True)
        return None
    except ValueError:
        do_sample = config.do_sample
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = do_sample
        raise UserError(
            f"generation_config.json of {name_or_path} cannot be saved again ({' '.join(str(error).split())[:300]}); "
            "correct it"
        ) from error
    return f"generation_config.json of {name_or_path} sets how to sample but not do_sample: it is saved with do_sample"
