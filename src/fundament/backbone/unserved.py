"""What the files of a directory of one's own may ask for that is not served.

Each of it would give other numbers than transformers and sentence-transformers do, and no error: so it is refused. The
catalogue's models need none of it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.sentence import PROMPTS, list_modules, read_prompts, read_sentence
from fundament.backbone.tokenizing import TextTokenizer
from fundament.errors import CheckpointError

_CAUSAL = ("qwen2", "qwen3")
_TURNED_BY_DECODER = ("bert", "roberta", "xlm-roberta", "camembert")  # whose code asks `is_decoder`

_ARGUMENTS = ("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_args", "config_kwargs", "model_args")
_WITHOUT_EFFECT = {
    *("dtype", "torch_dtype", "attn_implementation", "padding", "padding_side", "device_map", "trust_remote_code"),
    *("revision", "use_fast", "use_safetensors", "low_cpu_mem_usage", "local_files_only", "cache_dir", "token"),
    "add_pooling_layer",
}
"""Arguments of sentence-transformers' loading that change no vector but for rounding."""

# Types of which transformers' own models are served; BERT and XLM-RoBERTa are Jina's types too.
_IN_TRANSFORMERS = ("qwen2", "qwen3", "distilbert", "t5", "mpnet", "roberta", "camembert")
_IN_ORDER = re.compile("Transformer Pooling( Dense)*( Normalize)*")
_READ = {"max_seq_length", "do_lower_case", "modality_config", *_ARGUMENTS}
_SAID_ELSEWHERE = {"transformer_task", "module_output_name", "unpad_inputs"}  # by the family, by the modules
_OUTPUTS = ("last_hidden_state", "logits")

_TYPED_TOKENIZERS = ("BertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # which read tokenizer.json as it is

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


def refuse_turned(checkpoint: Checkpoint) -> None:
    """Look for what makes another model of a directory, whatever its entry in the catalogue says.

    Raises:
        CheckpointError: it attends to earlier tokens alone where its family attends both ways, or lowers its texts.
    """
    _refuse_lowering(checkpoint)
    if checkpoint.config.get("model_type") in _TURNED_BY_DECODER and checkpoint.config.get("is_decoder"):
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'} asks for attention to earlier tokens alone, which is not served"
        )


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
    if _names_code(config) and _is_stock(checkpoint):
        yield "config.json", "asks for code of its own (auto_map)"
    if _names_code(tokenizer):
        yield "tokenizer_config.json", "asks for code of its own (auto_map)"
    yield from _modules(checkpoint, dense=prompts)
    yield from _transformer(*read_sentence(checkpoint), dense=prompts)
    saved = checkpoint.json(PROMPTS, default={})
    for key in ("truncate_dim", "max_active_dims"):
        if saved.get(key) is not None:
            yield PROMPTS, f"cuts vectors ({key})"
    if not prompts and read_prompts(checkpoint)[0]:
        yield PROMPTS, "puts prompts before texts, for a model of this kind"
    if pairs and config.get("type_vocab_size", 1) > 1:
        yield from _types(checkpoint, tokenizer)
    yield from _words(checkpoint, tokenizer)


def _is_stock(checkpoint: Checkpoint) -> bool:
    """Whether transformers' own model is served: Jina's have the same types, and come with code that is served too."""
    config = checkpoint.config
    match config.get("model_type"):
        case "bert":
            return config.get("position_embedding_type") != "alibi"
        case "xlm-roberta":
            return any(".attention.self.query." in name for name in checkpoint.names)
        case kind:
            return kind in _IN_TRANSFORMERS and "JinaForRanking" not in (config.get("architectures") or ())


def _modules(checkpoint: Checkpoint, *, dense: bool) -> Iterator[tuple[str, str]]:
    """Modules whose code is the model's own, or that stand where they do something else."""
    file, modules = "modules.json", list_modules(checkpoint)
    for module in modules:  # jina-embeddings-v3 has code of its own, which chooses the adapter
        if not module.type.startswith("sentence_transformers.") and "lora_adaptations" not in checkpoint.config:
            yield file, f"asks for code of its own ({module.type})"
    order = " ".join(module.kind for module in modules if module.kind != "Dropout")
    if dense and order and not _IN_ORDER.fullmatch(order):
        yield file, f"orders its modules as {', '.join(module.kind for module in modules)}"
    for module in modules:
        config = str(PurePosixPath(module.folder) / "config.json")
        told = checkpoint.json(config, default={}) if module.kind == "Normalize" else {}
        if {told.get("module_input_name"), told.get("module_output_name")} - {"sentence_embedding", None}:
            yield config, "scales what is no vector of a text"


def _transformer(name: str, told: Mapping[str, Any], *, dense: bool) -> Iterator[tuple[str, str]]:
    """What the file of the first module asks for beside the longest input."""
    modes = told.get("modality_config") or {}
    if "message" in modes:
        yield name, "sends texts through a chat template (modality_config: message)"
    if text := modes.get("text"):
        method, output = text.get("method", "forward"), text.get("method_output_name", _OUTPUTS[0])
        if method != "forward" or output not in (_OUTPUTS[:1] if dense else _OUTPUTS):
            yield name, f"takes {output} of {method} (modality_config)"
    for arguments in _ARGUMENTS:
        if others := sorted(set(_keys(told.get(arguments))) - _WITHOUT_EFFECT):
            yield name, f"asks for {', '.join(others)} ({arguments})"
    if others := sorted(key for key in told.keys() - _READ - _SAID_ELSEWHERE if told[key] is not None):
        yield name, f"asks for {', '.join(others)}"


def _types(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Types of tokens that tokenizer.json gives and transformers may not pass on."""
    tokenizer = TextTokenizer(checkpoint.directory, checkpoint.config["max_position_embeddings"])
    if not tokenizer.pair_frame(led=False).typed:
        return
    names, kind = told.get("model_input_names"), told.get("tokenizer_class")
    if names and "token_type_ids" not in names:
        yield "tokenizer_config.json", "leaves out types of tokens that tokenizer.json gives (model_input_names)"
    if not names and kind and not str(kind).startswith(_TYPED_TOKENIZERS):
        yield "tokenizer_config.json", f"leaves open whether a {kind} gives types of tokens (write model_input_names)"


def _words(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where transformers would read words otherwise than tokenizer.json says."""
    whole = checkpoint.json("tokenizer.json")
    normalizer = whole.get("normalizer") or {}
    if told.get("truncation_side") == "left":
        yield "tokenizer_config.json", "cuts long texts at their beginning (truncation_side)"
    if (whole.get("truncation") or {}).get("direction") == "Left":
        yield "tokenizer.json", "cuts long texts at their beginning (truncation)"
    if told.get("split_special_tokens"):
        yield "tokenizer_config.json", "divides special tokens that a text spells (split_special_tokens)"
    kind = str(told.get("tokenizer_class") or checkpoint.config.get("model_type"))
    if kind not in _GENERIC_TOKENIZERS and normalizer.get("type") == "BertNormalizer":
        for key, own, usual in _BERT_WORDS:
            if (value := told.get(key, usual)) != normalizer.get(own):
                yield "tokenizer_config.json", f"means {key} {value}, and tokenizer.json says {normalizer.get(own)}"
    asked = told.get("add_prefix_space", False if kind.lower().startswith("roberta") else None)
    for divider in _dividers(whole.get("pre_tokenizer") or {}):
        spaced = divider.get("add_prefix_space", divider.get("prepend_scheme", "never") != "never")
        if divider.get("type") in ("ByteLevel", "Metaspace") and asked not in (None, spaced):
            yield "tokenizer_config.json", f"means add_prefix_space {asked}, and tokenizer.json says {spaced}"
    known = {token.get("content") for token in whole.get("added_tokens") or ()} | _vocabulary(whole)
    for name, added in _added(checkpoint, told):
        if added not in known:
            yield name, f"adds a token that tokenizer.json lacks: {added!r}"


def _added(checkpoint: Checkpoint, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tokens that files beside tokenizer.json add."""
    yield from (("added_tokens.json", token) for token in checkpoint.json("added_tokens.json", default={}))
    marks = "special_tokens_map.json"
    for file, says in ("tokenizer_config.json", told), (marks, checkpoint.json(marks, default={})):
        for key in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
            entries = says.get(key) or ()
            for token in entries.values() if isinstance(entries, dict) else entries:
                word = token.get("content") if isinstance(token, dict) else token
                if isinstance(word, str):
                    yield file, word


def _dividers(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer, or those that it is a sequence of."""
    yield from pre_tokenizer.get("pretokenizers") or (pre_tokenizer,)


def _vocabulary(tokenizer: Mapping[str, Any]) -> set[Any]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or ()
    return set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}


def _names_code(told: Mapping[str, Any]) -> bool:
    """Whether classes are named whose code lies beside the file; one that only reads settings changes nothing."""
    return bool(set(told.get("auto_map") or ()) - {"AutoConfig"})


def _keys(arguments: Any) -> Iterator[str]:
    """The names of arguments that say something, those of arguments for one kind of input too."""
    for key, value in arguments.items() if isinstance(arguments, dict) else ():
        if isinstance(value, dict):
            yield from _keys(value)
        elif value is not None:
            yield str(key)
