"""jina-embeddings-v3 with its five adapters against transformers' class with PEFT's adapters."""

import json
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from fundament.backbone.embedder import TextEmbedder
from fundament.core import Embed, Item
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongTogetherError
from tests.checkpoints import assert_same_alone, jina_v3, texts
from tests.checkpoints.jina_v3 import CONTEXT, ORDER, WRITERS, Layout
from tests.checkpoints.xlm_roberta import renamed, xlm_roberta

TASKS = (*ORDER, None)
TEXTS = ["", "a", *texts([1, 3, 5, 12])]
ASKED = [(text, task) for text in TEXTS for task in TASKS]

Asked = tuple[str, str | None]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("v3")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, TextEmbedder]:
    return {name: jina_v3.load(directory) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def networks(directories: dict[str, Path]) -> dict[str | None, nn.Module]:
    """Of each task, transformers' class under PEFT's adapter, read from the port's own folder."""
    config = json.loads((directories["port"] / "config.json").read_text())
    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    found: dict[str | None, nn.Module] = {}
    for task in TASKS:
        base = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**keys))
        base.load_state_dict(renamed(jina_v3.base(), "port"), strict=True)
        folder = task and jina_v3.folder_of(directories["port"], task)
        found[task] = (PeftModel.from_pretrained(base, folder) if folder else base).eval()
    return found


def rows(model: TextEmbedder, asked: list[Asked]) -> list[Item]:
    return [model.prepare(Embed(inputs=[text], task=task, truncate=True))[0] for text, task in asked]


def vectors(model: TextEmbedder, asked: list[Asked]) -> Tensor:
    return torch.from_numpy(np.stack(model.forward(rows(model, asked))))


def states(network: nn.Module, ids: object) -> Tensor:
    with torch.inference_mode():
        return network(input_ids=torch.as_tensor(ids)[None]).last_hidden_state[0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", WRITERS)
def test_each_task_equals_transformers_with_pefts_adapter(
    layout: Layout, models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]
) -> None:
    model = models[layout]
    expected = [
        states(networks[task], item.features["ids"]).mean(0)
        for item, (_, task) in zip(rows(model, ASKED), ASKED, strict=True)
    ]
    assert_same(vectors(model, ASKED), torch.stack(expected))


def test_adapters_show_in_the_result(models: dict[str, TextEmbedder]) -> None:
    model = models["woven"]
    same = rows(model, [("the search", "separation")])[0]
    alone = [Item(features={**same.features, "adapter": np.array(i)}, n_tokens=same.n_tokens) for i in range(-1, 5)]
    assert (torch.pdist(torch.from_numpy(np.stack(model.forward(alone)))) > 1e-1).all()


asked = st.tuples(st.text(max_size=30), st.sampled_from(TASKS))


@settings(deadline=None, max_examples=25)
@given(several=st.lists(asked, min_size=2, max_size=9))
def test_a_row_alone_equals_the_row_in_any_company(models: dict[str, TextEmbedder], several: list[Asked]) -> None:
    for model in models.values():
        assert_same_alone(partial(vectors, model), several)


def test_bfloat16_is_close_with_every_task(directories: dict[str, Path], models: dict[str, TextEmbedder]) -> None:
    rounded = jina_v3.load(directories["woven"], dtype=torch.bfloat16)
    assert torch.cosine_similarity(vectors(models["woven"], ASKED), vectors(rounded, ASKED)).min() > 0.99


def test_the_order_of_the_adapters_is_the_configs(tmp_path: Path, models: dict[str, TextEmbedder]) -> None:
    turned = jina_v3.load(jina_v3.woven(tmp_path, lora_adaptations=list(reversed(ORDER))))
    for task, other in zip(ORDER, reversed(ORDER), strict=True):
        ids = rows(turned, [("the search", task)])[0]
        expected = Item(features={**ids.features, "adapter": np.array(ORDER.index(other))}, n_tokens=ids.n_tokens)
        np.testing.assert_allclose(turned.forward([ids]), models["woven"].forward([expected]), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_adaptations": list(ORDER[:4])}, "lora_adaptations of config.json should name"),
        ({"lora_adaptations": [*ORDER[:4], "clustering"]}, "lora_adaptations of config.json should name"),
        ({"lora_rank": 8}, "should have the shape"),
    ],
)
def test_a_config_that_contradicts_the_adapters_is_refused(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        jina_v3.load(jina_v3.woven(tmp_path, **config))


@pytest.mark.parametrize("key", ["lora_adaptations", "lora_rank", "lora_alpha"])
def test_a_config_without_its_adapters_is_refused(tmp_path: Path, key: str) -> None:
    path = jina_v3.woven(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"does not say {key}"):
        jina_v3.load(tmp_path)


@pytest.mark.parametrize("alpha", [1, 4, 6])
def test_the_scale_is_alpha_over_rank(tmp_path: Path, alpha: int) -> None:
    model = jina_v3.load(jina_v3.woven(tmp_path, lora_alpha=alpha))
    term = model.transformer.layers[0].up.terms[0]
    a, b = jina_v3.terms()["encoder.layers.0.mlp.fc1"]
    assert term is not None
    torch.testing.assert_close(term.ups[0] @ term.down, alpha / jina_v3.RANK * b[0] @ a[0])


STEM = "roberta.encoder.layers.1.mlp.fc2.parametrizations.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{STEM}.0.lora_A", None, rf"not in the checkpoint: {STEM}\.0\.lora_A"),
        (f"{STEM}.original", None, rf"not in the checkpoint: {STEM}\.original"),
        (f"{STEM}.1.lora_A", torch.zeros(2), rf"not known to the model: {STEM}\.1\.lora_A"),
        ("roberta.emb_ln.parametrizations.weight.0.lora_A", torch.zeros(2), "not known to the model: .*emb_ln"),
        (f"{STEM}.0.lora_B", torch.zeros(4, 48, 4), rf"{STEM}\.0\.lora_B should have the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    jina_v3.resave(jina_v3.woven(tmp_path) / "model.safetensors", **{name: change})
    with pytest.raises(CheckpointError, match=message):
        jina_v3.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embeddings.word_embeddings.lora_embedding_A", None, "not in the checkpoint: .*lora_embedding_A"),
        ("layers.0.self_attn.k_proj.lora_B.weight", None, "not in the checkpoint: .*k_proj"),
        ("layers.0.norm.lora_B.weight", torch.zeros(2), "not known to the model: .*norm"),
    ],
)
def test_tensors_of_a_folder_that_do_not_fit_are_named(
    tmp_path: Path, name: str, change: Tensor | None, message: str
) -> None:
    path = jina_v3.port(tmp_path) / "separation" / "adapter_model.safetensors"
    jina_v3.resave(path, **{f"base_model.model.{name}": change})
    with pytest.raises(CheckpointError, match=message):
        jina_v3.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (jina_v3.port(tmp_path) / "text_matching").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no folders \['text_matching'\]"):
        jina_v3.load(tmp_path)


def test_weights_without_adapters_are_refused_under_the_models_own_id(tmp_path: Path) -> None:
    bare = xlm_roberta(tmp_path, names="flash", positions="rotary", pooling="mean_tokens", lora_adaptations=list(ORDER))
    with pytest.raises(CheckpointError, match="none of the adapters"):
        jina_v3.load(bare)
    assert jina_v3.load(bare, of=jina_v3.spec(tasks={})).adapters == {None: -1}


def test_adapters_that_no_task_chooses_are_refused(directories: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no task that chooses one"):
        jina_v3.load(directories["woven"], of=jina_v3.spec(tasks={}))


# Late chunking.


def late(model: TextEmbedder, sent: str | list[str], **fields: object) -> tuple[Tensor, list[Item]]:
    """What a text by itself gives, or texts in a list."""
    call = (
        Embed(inputs=[sent], late_chunking="sentences", **fields)  # type: ignore[arg-type]
        if isinstance(sent, str)
        else Embed(inputs=sent, late_chunking="inputs", **fields)  # type: ignore[arg-type]
    )
    items = model.prepare(call)
    return torch.from_numpy(finish(model, call, items, model.forward(items)).vectors), items


def ids_of(text: str) -> list[int]:
    ids: list[int] = jina_v3.unigram().encode(text, add_special_tokens=False).ids
    return ids


def slowly(network: nn.Module, prompt: list[int], parts: list[list[int]]) -> Tensor:
    """Read all ids at once, with the special tokens around them; the mean of each part's states."""
    joint = states(network, [0, *prompt, *(token for part in parts for token in part), 2])
    start, found = 1 + len(prompt), []
    for part in parts:
        found.append(joint[start : start + len(part)].mean(0))
        start += len(part)
    return torch.stack(found)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("task", TASKS)
def test_several_inputs_are_pooled_out_of_one_reading(
    layout: Layout, task: str | None, models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]
) -> None:
    model, inputs = models[layout], ["the search", "what people", "a", "naïve 東京"]
    prompted = ids_of(model.spec.tasks[task].prompt + inputs[0]) if task else ids_of(inputs[0])
    prompt, own = prompted[: -len(ids_of(inputs[0]))], prompted[-len(ids_of(inputs[0])) :]
    assert own == ids_of(inputs[0])
    expected = slowly(networks[task], prompt, [ids_of(text) for text in inputs])
    found, items = late(model, inputs, task=task)
    assert_same(found, expected)
    assert sum(item.n_counted for item in items) == 2 + sum(len(ids_of(text)) for text in inputs)
    alone = vectors(model, [(text, task) for text in inputs])
    assert ((found - alone).abs().amax(dim=1) > 1e-2).all(), "the neighbours show in each vector"


@pytest.mark.parametrize("task", ["retrieval.passage", None])
def test_a_single_text_is_pooled_by_sentences(
    task: str | None, models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]
) -> None:
    model, text = models["woven"], "the search. What people mean? 東京。naïve the\nend"
    prompt = model.spec.tasks[task].prompt if task else ""
    found, items = late(model, text, task=task)
    plain = model.prepare(Embed(inputs=[text], task=task))[0]
    assert np.array_equal(items[0].features["ids"], plain.features["ids"]), "it is read as it stands"
    assert items[0].n_counted == plain.n_counted
    whole = ids_of(prompt + text)
    tails = ["the search.", "What people mean?", "東京。", "naïve the", "end"]
    n_prompt = len(whole) - len(ids_of(text))
    parts, begun = [], text
    for sentence in reversed(tails):  # what a text's last sentence adds to the tokens before it
        begun = begun[: begun.rindex(sentence)]
        before = len(ids_of(prompt + begun.rstrip())) if begun else n_prompt
        parts.insert(0, whole[before:])
        whole = whole[:before]
    assert_same(found, slowly(networks[task], whole, parts))


@pytest.mark.parametrize("sent", ["the search", ["the search"], ["the search. What people"]])
def test_one_part_has_the_vector_of_its_own_tokens(
    sent: str | list[str], models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]
) -> None:
    found, _ = late(models["port"], sent)
    assert len(found) == 1, "a list has a vector per input"
    assert_same(found[0], states(networks[None], [0, *ids_of("".join(sent)), 2])[1:-1].mean(0))


LONG = ["the search " * 30, "what people " * 20, "東京 " * 20]


def test_windows_reach_what_does_not_fit(
    models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]
) -> None:
    model, window = models["woven"], 64
    found, items = late(model, LONG, task="text-matching", late_chunking_window=window)
    ids = [token for text in LONG for token in ids_of(text)]
    assert len(items) > 2
    assert max(item.n_tokens for item in items) == window
    assert sum(item.n_counted for item in items) == 2 + len(ids)
    # Each token's state out of the window in which it is farther from an end; the text's own ends do not count.
    room, n = window - 2, len(ids)
    starts = [*range(0, n - room, room - room // 4), n - room]
    read = {start: states(networks["text-matching"], [0, *ids[start : start + room], 2])[1:-1] for start in starts}

    def sight(token: int, start: int) -> int:
        before = token - start if start else n
        return min(before, start + room - 1 - token if start + room < n else n)

    picked = []
    for token in range(n):
        best = max(
            (start for start in starts if start <= token < start + room),
            key=lambda s: (sight(token, s), s),
        )
        picked.append(read[best][token - best])
    each = torch.stack(picked).split([len(ids_of(text)) for text in LONG])
    assert_same(found, torch.stack([part.mean(0) for part in each]))


def test_what_fits_a_window_is_read_once(models: dict[str, TextEmbedder]) -> None:
    windowed, items = late(models["woven"], ["the search", "what"], late_chunking_window=CONTEXT)
    assert len(items) == 1
    assert_same(windowed, late(models["woven"], ["the search", "what"])[0])


def test_what_does_not_fit_is_refused_with_the_way_out(models: dict[str, TextEmbedder]) -> None:
    with pytest.raises(TooLongTogetherError, match=r"maximum of 128 tokens.*'truncate: true'.*late_chunking_window"):
        late(models["woven"], LONG)
    with pytest.raises(TooLongTogetherError, match=r"nothing is left of input 2\. Use 'late_chunking_window'"):
        late(models["woven"], ["the " * 80, "the " * 60, "what", "a"], truncate=True)


def test_truncate_cuts_the_last_part(models: dict[str, TextEmbedder], networks: dict[str | None, nn.Module]) -> None:
    inputs = ["what " * 100, "the " * 60]
    parts = [ids_of(inputs[0]), ids_of(inputs[1])[: CONTEXT - 2 - len(ids_of(inputs[0]))]]
    found, items = late(models["woven"], inputs, truncate=True)
    assert_same(found, slowly(networks[None], [], parts))
    assert items[0].n_truncated == 1
    assert items[0].n_counted == items[0].n_tokens == CONTEXT
    sentences, _ = late(models["woven"], "What search. " * 60, truncate=True)
    each = len(ids_of("What search. " * 2)) - len(ids_of("What search. "))
    assert len(sentences) == -(-(CONTEXT - 2) // each), "sentences behind the cut have no vector"


@pytest.mark.parametrize("window", [1, 33, CONTEXT + 1])
def test_a_window_of_another_size_is_refused(models: dict[str, TextEmbedder], window: int) -> None:
    with pytest.raises(InputError, match=rf"late_chunking_window: Input should be from 34 to {CONTEXT}"):
        late(models["woven"], ["a", "b"], late_chunking_window=window)


@pytest.mark.parametrize(("inputs", "index"), [("", 0), (" \n", 0), ([""], 0), (["a", "", "b"], 1)])
def test_an_input_without_tokens_is_named(models: dict[str, TextEmbedder], inputs: str | list[str], index: int) -> None:
    with pytest.raises(InputError, match=rf"input -> {index}: This text has no tokens"):
        late(models["woven"], inputs)


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=40), min_size=1, max_size=6), company=st.lists(asked, max_size=4))
def test_a_joint_row_alone_equals_the_row_in_any_company(
    models: dict[str, TextEmbedder], inputs: list[str], company: list[Asked]
) -> None:
    model = models["woven"]
    parts: Literal["inputs", "sentences"] = "inputs" if len(inputs) > 1 else "sentences"
    call = Embed(inputs=inputs, task="separation", late_chunking=parts, late_chunking_window=40)
    try:
        items = model.prepare(call)
    except InputError:
        return
    alone = finish(model, call, items, model.forward(items)).vectors
    among = model.forward([*rows(model, company), *items])[len(company) :]
    np.testing.assert_allclose(finish(model, call, items, among).vectors, alone, atol=1e-5, rtol=1e-5)
    if len(inputs) > 1:
        assert len(alone) == len(inputs)
