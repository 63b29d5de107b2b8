"""What the files that sentence-transformers writes say about a checkpoint: pooling and longest input."""

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.pooling import Pooling
from fundament.errors import CheckpointError

_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}


def read_pooling(checkpoint: Checkpoint, default: Pooling | None = "mean") -> Pooling:
    """The pooling that `1_Pooling/config.json` names, else the one that `emb_pooler` of `config.json` names.

    Args:
        checkpoint: where the files are.
        default: the pooling where neither says one; None where the architecture has no usual one.

    Raises:
        CheckpointError: a pooling that is not served, several at once, or none.
    """
    config = checkpoint.json("1_Pooling/config.json", default={})
    named = config.get("pooling_mode") or (None if config else checkpoint.config.get("emb_pooler"))
    if named is None and not config:
        if default is None:
            raise CheckpointError(
                f"{checkpoint.directory} has no 1_Pooling/config.json, and models of this architecture pool in several "
                f'ways; write one that says {{"pooling_mode": …}}, one of {sorted(_NAMES)}'
            )
        return default
    asked = [named] if isinstance(named, str) else [key for key, on in config.items() if on is True and "mode" in key]
    known = [_NAMES.get(mode) or _POOLINGS.get(mode) for mode in asked]
    if len(known) != 1 or known[0] is None:
        raise CheckpointError(f"{checkpoint.directory}: pooling {asked} is not served; known are {sorted(_NAMES)}")
    return known[0]


def read_context(checkpoint: Checkpoint) -> int:
    """Most tokens of an input: `max_seq_length` of `sentence_bert_config.json`, or what the position table holds."""
    config = checkpoint.config
    table = int(config.get("max_position_embeddings", 512))
    if "roberta" in f"{config.get('model_type')} {config.get('architectures')}".lower() or (
        config.get("model_type") == "jina_embeddings_v3"
    ):
        # RoBERTa and its descendants count positions from the one after the padding token's id.
        table -= config.get("pad_token_id", 1) + 1
    told = checkpoint.json("sentence_bert_config.json", default={}).get("max_seq_length")
    return min(int(told), table) if told else table
