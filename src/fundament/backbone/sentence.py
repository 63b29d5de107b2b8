"""What the files that sentence-transformers writes say about a checkpoint: modules, pooling, prompts, longest input."""

import re
from dataclasses import dataclass
from typing import Any

import orjson

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.pooling import Pooling
from fundament.errors import CheckpointError

PROMPTS = "config_sentence_transformers.json"

_POOLINGS: dict[str, Pooling] = {  # by `pooling_mode`
    "cls": "first",
    "mean": "mean",
    "lasttoken": "last",
    "max": "max",
    "mean_sqrt_len_tokens": "root_mean",
    "weightedmean": "weighted_mean",
}
_FLAGS: dict[str, Pooling] = {  # by the keys that stand for it in older files, each true or false
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "root_mean",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
}
_BY_CONFIG: tuple[Pooling, ...] = ("first", "mean", "last")  # that `emb_pooler` may name

_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_WITHOUT_TABLE = ("qwen2", "qwen3", "eurobert", "t5")  # which read on behind what `config.json` names as most

_HEADED = re.compile("For(MaskedLM|SequenceClassification)$")
_HEAD_TENSORS = r"(cls|lm_head|vocab_(transform|layer_norm|projector)|pre_classifier|classifier|score)\..*"


@dataclass(frozen=True, slots=True)
class Module:
    """An entry of `modules.json`: the class and its package, and the folder of its files, empty for the model's own."""

    type: str
    folder: str

    @property
    def kind(self) -> str:
        """The class without its package, which moved between releases."""
        return self.type.rpartition(".")[2]


def list_modules(checkpoint: Checkpoint) -> list[Module]:
    """What `modules.json` names, in its order; none without one.

    Raises:
        CheckpointError: it is not such a list.
    """
    path = checkpoint.directory / "modules.json"
    if not path.exists():
        return []
    try:
        modules = orjson.loads(path.read_bytes())
        return [Module(str(module["type"]), str(module.get("path") or "")) for module in modules]
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error!r}") from error


def read_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """The same by their kind, each with its folder.

    Raises:
        CheckpointError: see `list_modules`.
    """
    return {module.kind: module.folder for module in list_modules(checkpoint)}


def is_pooled(checkpoint: Checkpoint) -> bool:
    """Whether `modules.json` has the states pooled: it is a dense model then, whatever heads lie beside it."""
    return "Pooling" in read_modules(checkpoint)


def known_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """`config.json` as families know their own by it: of a pooled model, without the head that its base had."""
    config = checkpoint.config
    if not is_pooled(checkpoint):
        return config
    return config | {"architectures": [_HEADED.sub("Model", str(name)) for name in config.get("architectures") or ()]}


def unneeded_heads(checkpoint: Checkpoint) -> str:
    """A pattern of the tensors of heads that a pooled model was trained on or cut from; of nothing where it is none."""
    return _HEAD_TENSORS if is_pooled(checkpoint) else r"(?!)"


def read_prompts(checkpoint: Checkpoint) -> tuple[dict[str, str], str | None]:
    """What `config_sentence_transformers.json` says goes before a text, by name, and which of it does unasked.

    Raises:
        CheckpointError: prompts that are no texts, or a default that is none of them.
    """
    config = checkpoint.json(PROMPTS, default={})
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise CheckpointError(f"{checkpoint.directory / PROMPTS}: prompts should be an object of texts")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise CheckpointError(
            f"{checkpoint.directory / PROMPTS}: default_prompt_name '{default}' is none of its prompts"
        )
    return (prompts, default) if any(prompts.values()) else ({}, None)


def read_pooling(checkpoint: Checkpoint, default: Pooling | None = "mean") -> Pooling:
    """The pooling that the pooling module's `config.json` names, else the one that `emb_pooler` of `config.json` names.

    The module's folder is the one that `modules.json` names, which must then be there, or `1_Pooling`.

    Args:
        checkpoint: where the files are.
        default: the pooling where neither says one; None where the architecture has no usual one.

    Raises:
        CheckpointError: a pooling that is not served, several at once, or none.
    """
    folder = read_modules(checkpoint).get("Pooling")
    config = checkpoint.json(f"{folder or '1_Pooling'}/config.json", default={} if folder is None else None)
    named = config.get("pooling_mode") or (None if config else checkpoint.config.get("emb_pooler"))
    if named is None and not config:
        if default is None:
            raise CheckpointError(
                f"{checkpoint.directory} has no 1_Pooling/config.json, and models of this architecture pool in several "
                f'ways; write one that says {{"pooling_mode": …}}, one of {sorted(_POOLINGS)}'
            )
        return default
    flags = [key for key, on in config.items() if on and "mode" in key]
    asked = [named] if isinstance(named, str) else named if isinstance(named, list) else flags
    known = [_POOLINGS.get(str(mode)) or _FLAGS.get(str(mode)) for mode in asked]
    if len(known) != 1 or known[0] is None or (not config and known[0] not in _BY_CONFIG):
        words = f"pooling {' and '.join(map(str, asked))} is not served" if asked else "its pooling names no mode"
        raise CheckpointError(f"{checkpoint.directory}: {words}; known are {sorted(_POOLINGS)}, one of them")
    if known != ["last"] and not config.get("include_prompt", True) and read_prompts(checkpoint)[0]:
        raise CheckpointError(f"{checkpoint.directory}: pooling without the prompt (include_prompt) is not served")
    return known[0]


def read_sentence(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The file that says how sentence-transformers reads texts, by any of its names, and what it says."""
    names = [f"sentence_{kind}_config.json" for kind in _KINDS]
    found = ((name, checkpoint.json(name, default={})) for name in names)
    return next(((name, told) for name, told in found if told), (names[0], {}))


def read_context(checkpoint: Checkpoint) -> int:
    """Most tokens of an input: what sentence-transformers reads, and no more than the position table holds.

    That is `max_seq_length` of `sentence_bert_config.json`, else the less of `max_position_embeddings` and
    `model_max_length` of `tokenizer_config.json`, which was called `max_len` once.

    Raises:
        CheckpointError: one that is no length, or a table without a position for a token.
    """
    config = checkpoint.config
    table = int(config.get("max_position_embeddings", 512))
    if "roberta" in f"{config.get('model_type')} {config.get('architectures')}".lower() or (
        config.get("model_type") in ("camembert", "jina_embeddings_v3", "mpnet")
    ):
        # RoBERTa, its descendants and MPNet count positions from the one after the padding token's id.
        table -= config.get("pad_token_id", 1) + 1
    if table < 1:
        raise CheckpointError(f"{checkpoint.directory}: config.json leaves no position for a token")
    name, sentence = read_sentence(checkpoint)
    tokenizer = checkpoint.json("tokenizer_config.json", default={})
    for file, key, told in (
        (name, "max_seq_length", sentence.get("max_seq_length")),
        ("tokenizer_config.json", "model_max_length", tokenizer.get("model_max_length")),
        ("tokenizer_config.json", "max_len", tokenizer.get("max_len")),
    ):
        if told is not None:
            if not isinstance(told, int | float) or isinstance(told, bool) or told < 1:
                raise CheckpointError(f"{checkpoint.directory / file}: {key} should be a number above 0, not {told!r}")
            bounded = key != "max_seq_length" or config.get("model_type") not in _WITHOUT_TABLE
            return int(min(told, table) if bounded else told)
    return table
