"""What the files of a directory of one's own may ask for that is not served.

Each of it would give other numbers than transformers and sentence-transformers do, and no error: so it is refused. The
catalogue's models need none of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.sentence import PROMPTS, read_prompts, read_sentence
from fundament.backbone.tokenizing import TextTokenizer
from fundament.errors import CheckpointError

_CAUSAL = ("qwen2", "qwen3")
_TURNED_BY_DECODER = ("bert", "roberta", "xlm-roberta", "camembert")  # whose code asks `is_decoder`

_ARGUMENTS = ("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_args", "config_kwargs", "model_args")
_WITHOUT_EFFECT = {
    *("dtype", "torch_dtype", "attn_implementation", "padding", "padding_side", "device_map", "trust_remote_code"),
    *("revision", "use_fast", "use_safetensors", "low_cpu_mem_usage", "local_files_only", "cache_dir", "token"),
}
"""Arguments of sentence-transformers' loading that change no vector but for rounding."""

# Of `tokenizer_config.json`, of the normalizer, and what a tokenizer of BERT's kind takes where the first says nothing.
_BERT_WORDS = (
    ("do_lower_case", "lowercase", True),
    ("strip_accents", "strip_accents", None),
    ("tokenize_chinese_chars", "handle_chinese_chars", True),
)


def refuse_unserved(checkpoint: Checkpoint, *, prompts: bool, pairs: bool) -> None:
    """Look through the files beside the weights.

    Args:
        checkpoint: where they are.
        prompts: whether a prompt before a text is served for what this model makes.
        pairs: whether it reads two texts as one.

    Raises:
        CheckpointError: something that would change vectors or scores is asked for, or a file is not as it should be.
    """
    _refuse_lowering(checkpoint)
    try:
        wish = next(_wishes(checkpoint, prompts=prompts, pairs=pairs), None)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.directory} cannot be read; is one of its files wrong? {error!r}") from error
    if wish is not None:
        file, words = wish
        raise CheckpointError(f"{checkpoint.directory / file} {words}, which is not served")


def _refuse_lowering(checkpoint: Checkpoint) -> None:
    """Texts are read as the tokenizer reads them.

    Raises:
        CheckpointError: `do_lower_case` asks for lower case, and the tokenizer keeps capitals.
    """
    name, told = read_sentence(checkpoint)
    if not told.get("do_lower_case"):
        return
    normalizer = str(checkpoint.json("tokenizer.json").get("normalizer"))
    if "'lowercase': True" not in normalizer and "'Lowercase'" not in normalizer:
        raise CheckpointError(
            f"{checkpoint.directory / name} asks for do_lower_case, which is not served: "
            "let the normalizer of tokenizer.json do it"
        )


def _wishes(checkpoint: Checkpoint, *, prompts: bool, pairs: bool) -> Iterator[tuple[str, str]]:
    """Files, and what they ask for."""
    config, tokenizer = checkpoint.config, checkpoint.json("tokenizer_config.json", default={})
    kind = config.get("model_type")
    causal = config.get("is_causal")
    if causal is None and kind in _TURNED_BY_DECODER:
        causal = config.get("is_decoder")
    if causal is not None and bool(causal) != (kind in _CAUSAL):
        yield "config.json", "asks for attention to earlier tokens alone" if causal else "asks for attention both ways"
    if (checkpoint.directory / "adapter_config.json").exists():
        yield "adapter_config.json", "puts an adapter on the weights (merge it into them)"
    name, sentence = read_sentence(checkpoint)
    if "message" in (sentence.get("modality_config") or {}):
        yield name, "sends texts through a chat template (modality_config: message)"
    for arguments in _ARGUMENTS:
        if others := sorted(set(_keys(sentence.get(arguments))) - _WITHOUT_EFFECT):
            yield name, f"asks for {', '.join(others)} ({arguments})"
    saved = checkpoint.json(PROMPTS, default={})
    for key in ("truncate_dim", "max_active_dims"):
        if saved.get(key) is not None:
            yield PROMPTS, f"cuts vectors ({key})"
    if not prompts and read_prompts(checkpoint)[0]:
        yield PROMPTS, "puts prompts before texts, for a model of this kind"
    if tokenizer.get("truncation_side") == "left":
        yield "tokenizer_config.json", "cuts long texts at their beginning (truncation_side)"
    names = tokenizer.get("model_input_names") or ("token_type_ids",)
    typed = pairs and config.get("type_vocab_size", 1) > 1 and "token_type_ids" not in names
    if typed and TextTokenizer(checkpoint.directory, config["max_position_embeddings"]).pair_frame(led=False).typed:
        yield "tokenizer_config.json", "leaves out types of tokens that tokenizer.json gives (model_input_names)"
    yield from _words(checkpoint, tokenizer)


def _words(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where transformers would read words otherwise than tokenizer.json says."""
    whole = checkpoint.json("tokenizer.json")
    normalizer = whole.get("normalizer") or {}
    bert = str(told.get("tokenizer_class")).startswith(("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer"))
    if bert and normalizer.get("type") == "BertNormalizer":
        for key, own, usual in _BERT_WORDS:
            if (value := told.get(key, usual)) != normalizer.get(own):
                yield "tokenizer_config.json", f"means {key} {value}, and tokenizer.json says {normalizer.get(own)}"
    known = {token.get("content") for token in whole.get("added_tokens") or ()} | _vocabulary(whole)
    for name, added in _added(checkpoint, told):
        if added not in known:
            yield name, f"adds a token that tokenizer.json lacks: {added!r}"


def _added(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tokens that files beside tokenizer.json add."""
    yield from (("added_tokens.json", token) for token in checkpoint.json("added_tokens.json", default={}))
    for key in ("added_tokens_decoder", "extra_special_tokens"):
        entries = told.get(key) or ()
        for token in entries.values() if isinstance(entries, dict) else entries:
            word = token.get("content") if isinstance(token, dict) else token
            if isinstance(word, str):
                yield "tokenizer_config.json", word


def _vocabulary(tokenizer: Mapping[str, Any]) -> set[Any]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or ()
    return set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}


def _keys(arguments: Any) -> Iterator[str]:
    """The names of arguments that say something, those of arguments for one kind of input too."""
    for key, value in arguments.items() if isinstance(arguments, dict) else ():
        if isinstance(value, dict):
            yield from _keys(value)
        elif value is not None:
            yield str(key)
