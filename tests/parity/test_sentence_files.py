"""A directory of one's own gives sentence-transformers' vectors, by what the files beside its weights say."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.normalizers import BertNormalizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fundament.backbone.device import Placement
from fundament.catalog import CATALOG
from fundament.core import Embed
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import Local, from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import assert_same_alone, embed, texts, word_piece
from tests.checkpoints.dense import IDENTITY, TANH, write_dense
from tests.checkpoints.splade import splade
from tests.conftest import FLOAT32
from tests.inprocess import running

POOLING, SENTENCE = "1_Pooling/config.json", "sentence_bert_config.json"
PROMPTS, TOKENIZER = "config_sentence_transformers.json", "tokenizer_config.json"
TEXTS = ["what people search", "the search " * 60]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A BERT with capitals in its vocabulary, as sentence-transformers writes one."""
    torch.manual_seed(0)
    tokenizer = word_piece()
    tokenizer.normalizer = BertNormalizer(lowercase=False)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(tmp_path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path, POOLING, word_embedding_dimension=48, pooling_mode_mean_tokens=True)
    write(tmp_path, SENTENCE, max_seq_length=64)
    return tmp_path


def write(directory: Path, name: str, **config: Any) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(config))


def check(directory: Path) -> None:
    local = from_argument(f"mine={directory}", directory)
    model = load_model(local, FLOAT32)
    items = model.prepare(call := Embed(inputs=TEXTS, task=local.spec.default_task, truncate=True))
    vectors = torch.from_numpy(finish(model, call, items, model.forward(items)).vectors)
    reference = SentenceTransformer(str(directory), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(torch.nn.functional.normalize(vectors), reference, atol=1e-5, rtol=1e-5)


def test_the_pooling_is_in_the_folder_that_the_modules_name(directory: Path) -> None:
    check(directory)
    (directory / "3_Other").mkdir()
    write(directory, "3_Other/config.json", word_embedding_dimension=48, pooling_mode_cls_token=True)
    modules = (directory / "modules.json").read_text()
    (directory / "modules.json").write_text(modules.replace("1_Pooling", "3_Other"))
    check(directory)
    (directory / "3_Other/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no 3_Other/config\.json"):
        load_model(from_argument(f"mine={directory}", directory), FLOAT32)


def test_a_list_of_one_pooling_is_that_pooling(directory: Path) -> None:
    write(directory, POOLING, embedding_dimension=48, pooling_mode=["cls"])
    check(directory)


def test_the_longest_input(directory: Path) -> None:
    write(directory, SENTENCE)
    write(directory, TOKENIZER, **json.loads((directory / TOKENIZER).read_text()) | {"model_max_length": 16})
    assert from_argument(f"mine={directory}", directory).spec.context == 16
    check(directory)
    for told in ("x", -5):
        write(directory, SENTENCE, max_seq_length=told)
        with pytest.raises(CheckpointError, match="max_seq_length should be a number above 0"):
            from_argument(f"mine={directory}", directory)


def test_prompts_are_tasks_and_one_may_go_before_every_text(directory: Path) -> None:
    write(directory, PROMPTS, prompts={"query": "people: ", "document": ""}, default_prompt_name="query")
    spec = from_argument(f"mine={directory}", directory).spec
    assert ({name: task.prompt for name, task in spec.tasks.items()}, spec.default_task) == (
        {"query": "people: ", "document": ""},
        "query",
    )
    check(directory)
    write(directory, POOLING, word_embedding_dimension=48, pooling_mode_mean_tokens=True, include_prompt=False)
    with pytest.raises(CheckpointError, match="include_prompt"):
        load_model(from_argument(f"mine={directory}", directory), FLOAT32)
    write(directory, PROMPTS, prompts={"query": "people: "}, default_prompt_name="passage")
    with pytest.raises(CheckpointError, match="'passage' is none of its prompts"):
        from_argument(f"mine={directory}", directory)


def test_prompts_for_either_side_of_a_search_rank(directory: Path) -> None:
    for prompts, sides in (
        ({"query": "people: ", "document": "what "}, ("query", "document")),
        ({"query": "people: ", "passage": "what "}, ("query", "passage")),
        ({"other": "people: "}, (None, None)),
    ):
        write(directory, PROMPTS, prompts=prompts)
        assert from_argument(f"mine={directory}", directory).spec.search_tasks == sides


@pytest.mark.parametrize(
    ("file", "said", "words"),
    [
        ("config.json", {"is_decoder": True}, "attention to earlier tokens alone"),
        ("config.json", {"is_causal": True}, "attention to earlier tokens alone"),
        ("config.json", {"model_type": ["bert"]}, "model_type in a word"),
        (SENTENCE, {"modality_config": {"text": {}, "message": {}}}, "chat template"),
        (SENTENCE, {"processing_kwargs": {"text": {"max_length": 8}}}, "max_length"),
        (SENTENCE, {"tokenizer_args": {"model_max_length": 8}}, "model_max_length"),
        (SENTENCE, {"config_kwargs": {"layer_norm_eps": 0.1}}, "layer_norm_eps"),
        ("sentence_roberta_config.json", {"do_lower_case": True}, "do_lower_case"),
        (PROMPTS, {"truncate_dim": 16}, "truncate_dim"),
        (PROMPTS, {"prompts": {"a": "b"}, "default_prompt_name": ["a"]}, "none of its prompts"),
        (TOKENIZER, {"truncation_side": "left"}, "truncation_side"),
        (TOKENIZER, {"tokenizer_class": "BertTokenizer"}, "means do_lower_case True, and tokenizer.json says False"),
        (TOKENIZER, {"extra_special_tokens": {"new": "[NEW]"}}, r"lacks: '\[NEW\]'"),
        ("added_tokens.json", {"[NEW]": 900}, r"lacks: '\[NEW\]'"),
        ("adapter_config.json", {"r": 4}, "puts an adapter on the weights"),
        (TOKENIZER, {"extra_special_tokens": 5}, "is one of its files wrong"),
        (SENTENCE, {"modality_config": 5}, "is one of its files wrong"),
        (TOKENIZER, {"added_tokens_decoder": {"900": {"content": "[NEW]"}}}, r"lacks: '\[NEW\]'"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Mine"}}, r"config\.json asks for code of its own"),
        (TOKENIZER, {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, r"config\.json asks for code of its own"),
        (SENTENCE, {"modality_config": {"text": {"method_output_name": ["hidden_states", -2]}}}, "hidden_states"),
        (SENTENCE, {"modality_config": {"text": {"method_output_name": "logits"}}}, "logits of forward"),
        (SENTENCE, {"modality_config": {"text": {"method": "get_text_features"}}}, "get_text_features"),
        (SENTENCE, {"query_length": 8, "document_length": None}, "asks for query_length, which"),
        (SENTENCE, {"max_seq_length": True}, "max_seq_length should be a number"),
        (SENTENCE, {"max_seq_length": 2}, "a context of 2 leaves no room"),
        (TOKENIZER, {"tokenizer_class": None, "do_lower_case": True}, "means do_lower_case True"),
        (TOKENIZER, {"tokenizer_class": "ElectraTokenizer", "do_lower_case": True}, "means do_lower_case True"),
        (TOKENIZER, {"split_special_tokens": True}, "split_special_tokens"),
        (TOKENIZER, {"additional_special_tokens": ["[NEW]"]}, r"lacks: '\[NEW\]'"),
        ("special_tokens_map.json", {"additional_special_tokens": ["[NEW]"]}, r"lacks: '\[NEW\]'"),
        ("tokenizer.json", {"truncation": {"direction": "Left", "max_length": 9, "stride": 0}}, "at their beginning"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "scales what is no vector"),
        (POOLING, {"pooling_mode_cls_token": 1}, "pooling pooling_mode_mean_tokens and .*_cls_token is not served"),
        (POOLING, {"pooling_mode": ["cls", "mean"]}, "pooling cls and mean is not served"),
        (POOLING, {"pooling_mode": "median"}, "pooling median is not served; known are"),
        (POOLING, {"pooling_mode_mean_tokens": False}, "its pooling names no mode"),
    ],
)
def test_what_would_change_vectors_and_is_not_served_is_refused(
    directory: Path, file: str, said: dict[str, Any], words: str
) -> None:
    if file.startswith("sentence_roberta"):
        (directory / SENTENCE).unlink()
    told = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
    write(directory, file, **told | said)
    with pytest.raises(CheckpointError, match=words):
        load_model(from_argument(f"mine={directory}", directory), FLOAT32)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["Transformer", "Normalize", "Pooling"], "orders its modules as Transformer, Normalize, Pooling"),
        (["Transformer", "Pooling", "Pooling"], "orders its modules"),
        (["Pooling", "Transformer", "Normalize"], "orders its modules"),
        (["Transformer", "Normalize"], "orders its modules as Transformer, Normalize"),
        (["Transformer", "mine.Pooling", "Normalize"], r"code of its own \(mine\.Pooling\)"),
        (["custom_st.Transformer", "Pooling"], r"code of its own \(custom_st\.Transformer\)"),
    ],
)
def test_modules_in_another_order_or_of_other_code_are_refused(directory: Path, kinds: list[str], words: str) -> None:
    modules = [
        {"path": name and f"{n}_{name}", "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
        for name in [kind.rpartition(".")[2].removeprefix("Transformer")]
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=words):
        from_argument(f"mine={directory}", directory)


def test_what_changes_no_vector_is_served(directory: Path) -> None:
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    for file, said in (
        ("config.json", {"is_decoder": True, "is_causal": False}),
        (SENTENCE, {"modality_config": {"text": forward}, "module_output_name": "token_embeddings"}),
        (SENTENCE, {"processor_kwargs": {"padding_side": "right"}, "model_args": {"add_pooling_layer": False}}),
        (SENTENCE, {"transformer_task": "feature-extraction", "unpad_inputs": None, "query_length": None}),
        ("config.json", {"auto_map": {"AutoConfig": "configuration.Mine"}}),
        (PROMPTS, {"truncate_dim": None, "prompts": {"query": "", "document": ""}}),
        (TOKENIZER, {"truncation_side": "right", "added_tokens_decoder": {"0": {"content": "[PAD]"}}}),
    ):
        told = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
        write(directory, file, **told | said)
    check(directory)


def test_the_file_of_an_older_name_is_read(directory: Path) -> None:
    (directory / SENTENCE).rename(directory / "sentence_distilbert_config.json")
    assert from_argument(f"mine={directory}", directory).spec.context == 64
    check(directory)


def test_a_model_in_a_folder_is_not_looked_for_beside_it(directory: Path) -> None:
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="says that the model is in 0_Transformer"):
        from_argument(f"mine={directory}", directory)


def test_pooling_without_the_prompt_is_refused(directory: Path) -> None:
    write(directory, PROMPTS, prompts={"query": "people: "}, default_prompt_name="query")
    for mode in ("cls_token", "mean_tokens"):
        for without in (False, None, 0):
            told = {f"pooling_mode_{mode}": True, "include_prompt": without}
            write(directory, POOLING, word_embedding_dimension=48, **told)
            with pytest.raises(CheckpointError, match="include_prompt"):
                load_model(from_argument(f"mine={directory}", directory), FLOAT32)
    write(directory, POOLING, word_embedding_dimension=48, pooling_mode_lasttoken=True, include_prompt=False)
    check(directory)


def test_lower_case_is_the_tokenizers_work(directory: Path) -> None:
    write(directory, SENTENCE, do_lower_case=True)
    with pytest.raises(CheckpointError, match=r"do_lower_case.*normalizer of tokenizer\.json"):
        from_argument(f"mine={directory}", directory)
    tokenizer = word_piece()
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    check(directory)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([48, 48], {"bias": True, "activation_function": TANH}),
        ([48, 20], {"bias": False, "activation_function": IDENTITY, "pickled": True}),
        ([48, 96, 24], {"bias": True, "activation_function": IDENTITY, "module_output_name": None}),
        ([48, 20], {"bias": True}),
    ],
)
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_dense_layers_follow_the_pooling(
    directory: Path, pooling: str, sizes: list[int], options: dict[str, Any]
) -> None:
    write(directory, POOLING, word_embedding_dimension=48, **{f"pooling_mode_{pooling}": True})
    write_dense(directory, sizes, **options)
    local = from_argument(f"mine={directory}", directory)
    assert local.spec.dim == sizes[-1]
    check(directory)
    model = load_model(local, FLOAT32)
    reference = SentenceTransformer(str(directory), device="cpu")
    inputs = ["", *texts([1, 2, 3, 5, 20])]
    features = reference.preprocess(inputs)
    with torch.inference_mode():
        for module in [*reference][:-1]:  # before they are normalised
            features = module(features)
    torch.testing.assert_close(embed(model, inputs), features["sentence_embedding"], atol=1e-5, rtol=1e-5)
    assert_same_alone(partial(embed, model), inputs)
    assert load_model(local, Placement(torch.device("cpu"), torch.bfloat16)).dense[-1].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"activation_function": "torch.nn.modules.activation.ReLU"}, "activation_function .*ReLU' is not served"),
        ({"activation_function": None}, "activation_function None is not served"),
        ({"use_residual": True}, "use_residual True is not served"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings' is not served"),
        ({"scale": 2}, "scale 2 is not served"),
        ({"out_features": "24"}, "out_features should be a number"),
        ({"out_features": 25}, r"linear\.weight should have the shape \[25, 48\]"),
        ({"bias": False}, r"not known to the model: linear\.bias"),
    ],
)
def test_a_dense_layer_that_does_something_else_is_refused(directory: Path, said: dict[str, Any], words: str) -> None:
    write_dense(directory, [48, 24], bias=True, activation_function=TANH)
    path = "2_Dense/config.json"
    write(directory, path, **json.loads((directory / path).read_text()) | said)
    with pytest.raises(CheckpointError, match=words):
        load_model(from_argument(f"mine={directory}", directory), FLOAT32)


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 1, 3, 2], [1, 0, 2, 3]])
def test_a_dense_layer_elsewhere_than_behind_the_pooling_is_refused(directory: Path, order: list[int]) -> None:
    write_dense(directory, [48, 48], bias=True, activation_function=TANH)
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "modules.json").write_text(json.dumps([modules[place] for place in order]))
    with pytest.raises(CheckpointError, match="behind Pooling and before Normalize"):
        from_argument(f"mine={directory}", directory)


@pytest.mark.parametrize("kind", ["Dense", "custom.Dense"])
def test_another_packages_dense_layer_is_refused(directory: Path, kind: str) -> None:
    write_dense(directory, [48, 48], bias=True, activation_function=TANH)
    path = directory / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.models.Dense", kind))
    with pytest.raises(CheckpointError, match="not sentence-transformers' own Dense"):
        from_argument(f"mine={directory}", directory)


def test_parts_of_a_text_are_means_alone(directory: Path) -> None:
    spec = replace(CATALOG["all-minilm-l6-v2"], dim=48, context=64, late_chunking=True)
    load_model(Local(spec, directory), FLOAT32)
    write(directory, POOLING, word_embedding_dimension=48, pooling_mode="max")
    with pytest.raises(
        CheckpointError, match="takes the mean, of parts of a text too, and this checkpoint pools 'max'"
    ):
        load_model(Local(spec, directory), FLOAT32)
    write(directory, POOLING, word_embedding_dimension=48, pooling_mode="mean")
    write_dense(directory, [48, 48], bias=True, activation_function=TANH)
    with pytest.raises(CheckpointError, match="pools 'mean' before a dense layer"):
        load_model(Local(spec, directory), FLOAT32)


def test_a_dropout_changes_nothing(directory: Path) -> None:
    (directory / "4_Dropout").mkdir()
    write(directory, "4_Dropout/config.json", dropout=0.9)
    modules = json.loads((directory / "modules.json").read_text())
    dropout = {"idx": 9, "name": "9", "path": "4_Dropout", "type": "sentence_transformers.models.Dropout"}
    (directory / "modules.json").write_text(json.dumps([*modules[:2], dropout, *modules[2:]]))
    check(directory)
    write_dense(directory, [48, 24], bias=True, activation_function=TANH)
    check(directory)


def test_the_similarity_that_is_named_ranks(directory: Path) -> None:
    """Vectors have lengths of their own here: nothing makes them one, so that products order otherwise than cosines."""
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "modules.json").write_text(json.dumps(modules[:2]))
    documents = ["search", "people " * 30, "what people search", "a", "the the", "engine of the search"]
    orders = {}
    for named, score in (("dot", "dot"), ("dot_score", "dot"), ("cosine", "cosine"), (None, "cosine")):
        write(directory, PROMPTS, similarity_fn_name=named)
        with running(directory / "data", models=[f"mine={directory}"], dtype="float32") as api:
            asked = {"model": "mine", "query": TEXTS[0], "documents": documents}
            results = api.run(api.client.post("/v1/rerank", json=asked)).json()["results"]
            [listed] = api.run(api.client.get("/v1/models")).json()["data"]
        assert listed["score"] == score
        write(directory, PROMPTS, similarity_fn_name="dot" if score == "dot" else named)
        reference = SentenceTransformer(str(directory), device="cpu")
        [expected] = reference.similarity(reference.encode([TEXTS[0]]), reference.encode(documents))
        found = {result["index"]: result["relevance_score"] for result in results}
        torch.testing.assert_close(
            torch.tensor([found[place] for place in range(len(documents))]), expected, atol=1e-4, rtol=1e-4
        )
        orders[score] = [result["index"] for result in results]
    assert orders["dot"] != orders["cosine"]


def test_products_of_vectors_of_unit_length_are_cosines(directory: Path) -> None:
    write(directory, PROMPTS, similarity_fn_name="dot")
    assert from_argument(f"mine={directory}", directory).spec.score == "cosine"


@pytest.mark.parametrize("named", ["euclidean", "manhattan", "maxsim", ["dot"]])
def test_a_similarity_that_is_not_served_is_refused(directory: Path, named: Any) -> None:
    write(directory, PROMPTS, similarity_fn_name=named)
    with pytest.raises(CheckpointError, match="is not served for dense vectors, of which cosine or dot is"):
        from_argument(f"mine={directory}", directory)


def test_weights_of_tokens_are_compared_by_their_product_alone(tmp_path: Path) -> None:
    splade(tmp_path, "bert")
    write(tmp_path, PROMPTS, similarity_fn_name="dot")
    assert from_argument(f"mine={tmp_path}", tmp_path).spec.score == "dot"
    write(tmp_path, PROMPTS, similarity_fn_name="cosine")
    with pytest.raises(CheckpointError, match="'cosine' is not served for sparse vectors, of which dot is"):
        from_argument(f"mine={tmp_path}", tmp_path)


@pytest.mark.parametrize("headed", [BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_is_pooled_is_dense_whatever_its_base_was(
    directory: Path, headed: type[PreTrainedModel], whole: bool
) -> None:
    """`config.json` may keep its base's architecture, and the weights a head: sentence-transformers needs neither."""
    inputs = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write(directory, TOKENIZER, **json.loads((directory / TOKENIZER).read_text()) | inputs)
    config = BertConfig(**json.loads((directory / "config.json").read_text()), num_labels=1)
    if whole:
        headed(config).save_pretrained(directory)
    told = json.loads((directory / "config.json").read_text())
    write(directory, "config.json", **told | {"architectures": [headed.__name__]})
    spec = from_argument(f"mine={directory}", directory).spec
    assert (spec.family, spec.kind, spec.outputs) == ("bert", "embedding", ("dense",))
    check(directory)
    (directory / "modules.json").unlink()
    spec = from_argument(f"mine={directory}", directory).spec
    assert (spec.outputs == ("sparse",)) == (headed is BertForMaskedLM)
    assert (spec.kind == "reranker") == (headed is BertForSequenceClassification and whole)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "mpnet", "roberta", "camembert", "xlm-roberta", "t5", "qwen2"])
def test_code_of_a_models_own_is_not_passed_over(directory: Path, kind: str) -> None:
    told = json.loads((directory / "config.json").read_text())
    write(directory, "config.json", **told | {"model_type": kind, "auto_map": {"AutoModel": "modeling.Mine"}})
    with pytest.raises(CheckpointError, match=r"config\.json asks for code of its own"):
        from_argument(f"mine={directory}", directory)
