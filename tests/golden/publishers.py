"""How each model's publisher runs it: from a directory to a function that answers cases.

A dense vector or a score per input is an array, vectors per token are an array per input, weights a mapping per input.
Libraries are imported where they are used, for no environment has them all.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fundament.catalog import ModelSpec, Task
from tests.golden.cases import Case

Answer = Callable[[Case], Sequence[Any]]
Publisher = Callable[[ModelSpec, str], Answer]

_WEIGHTS = {"torch_dtype": torch.float32}  # the name that every release of transformers knows
_TRUST: dict[str, Any] = {"trust_remote_code": True, "model_kwargs": _WEIGHTS, "device": "cpu"}


def publisher_of(spec: ModelSpec) -> Publisher:
    """Its own code where a model brings such, otherwise sentence-transformers' class for what it gives."""
    if spec.kind == "reranker":
        return _OWN.get(spec.id, cross_encoder)
    return _OWN.get(spec.id) or {"dense": dense, "multi": multi_vector, "sparse": sparse}[spec.outputs[0]]


def dense(spec: ModelSpec, directory: str) -> Answer:
    """A sentence encoder; pictures go to it as they are."""
    from sentence_transformers import SentenceTransformer

    network = SentenceTransformer(directory, **_TRUST)

    def answer(case: Case) -> Sequence[Any]:
        task, inputs = _task(spec, case), [_open(value) for value in case["input"]]
        prompt = task.prompt if isinstance(inputs[0], str) else ""
        chosen = {"task": task.adapter} if task.adapter else {}
        vectors: Sequence[Any] = network.encode(inputs, prompt=prompt, normalize_embeddings=True, **chosen)
        return vectors

    return answer


def multi_vector(spec: ModelSpec, directory: str) -> Answer:
    """ColBERT. The README of jina-colbert-v2 lets tokens attend to the mask tokens, its metadata may not."""
    from sentence_transformers import MultiVectorEncoder

    network = MultiVectorEncoder(directory, **_TRUST)
    if spec.id == "jina-colbert-v2":
        network[0].query_expansion = {**network[0].query_expansion, "attend": True}

    def answer(case: Case) -> Sequence[Any]:
        encode = network.encode_query if case["role"] == "query" else network.encode_document
        vectors: Sequence[Any] = encode(case["input"], convert_to_numpy=True)
        return vectors

    return answer


def sparse(spec: ModelSpec, directory: str) -> Answer:
    """SPLADE. ELSER's tokens are written as Elasticsearch writes them, without dots."""
    from sentence_transformers import SparseEncoder

    network = SparseEncoder(directory, **_TRUST)

    def name(token: str) -> str:
        return token.replace(".", "__") if spec.dotless else token

    def answer(case: Case) -> Sequence[Any]:
        encode = network.encode_query if case["role"] == "query" else network.encode_document
        return [{name(token): weight for token, weight in row} for row in network.decode(encode(case["input"]))]

    return answer


def bge_m3(spec: ModelSpec, directory: str) -> Answer:
    """Three outputs of one pass; the weights come by the ids of tokens."""
    from FlagEmbedding import BGEM3FlagModel

    network = BGEM3FlagModel(directory, use_fp16=False, devices="cpu")
    name = network.tokenizer.convert_ids_to_tokens

    def answer(case: Case) -> Sequence[Any]:
        made = network.encode(case["input"], return_dense=True, return_sparse=True, return_colbert_vecs=True)
        if case["output"] == "sparse":
            return [{name(int(i)): float(w) for i, w in weights.items()} for weights in made["lexical_weights"]]
        vectors: Sequence[Any] = made["dense_vecs" if case["output"] == "dense" else "colbert_vecs"]
        return vectors

    return answer


def clip(spec: ModelSpec, directory: str) -> Answer:
    """jina-clip, one method per tower."""
    network = _remote(directory)

    def answer(case: Case) -> Sequence[Any]:
        inputs = [_open(value) for value in case["input"]]
        is_text = isinstance(inputs[0], str)
        vectors: Sequence[Any] = (
            network.encode_text(inputs, task=case["task"]) if is_text else network.encode_image(inputs)
        )
        return vectors

    return answer


def embeddings_v4(spec: ModelSpec, directory: str) -> Answer:
    """jina-embeddings-v4, whose code asks for bfloat16 on any device: the switch is held off here."""
    network = _remote(directory)

    def answer(case: Case) -> Sequence[Any]:
        task, inputs = _task(spec, case), [_open(value) for value in case["input"]]
        chosen = {"task": task.adapter, "return_multivector": case["output"] == "multi"}
        with patch("torch.autocast", partial(torch.autocast, enabled=False)):
            if isinstance(inputs[0], str):
                prompt = task.prompt.removesuffix(": ").lower()
                made = network.encode_text(inputs, prompt_name=prompt, **chosen)
            else:
                made = network.encode_image(inputs, **chosen)
        return [vectors.float().cpu().numpy() for vectors in made]

    return answer


def cross_encoder(spec: ModelSpec, directory: str) -> Answer:
    """A classifier of pairs with one label."""
    from sentence_transformers import CrossEncoder

    network = CrossEncoder(directory, num_labels=1, **_TRUST)

    def answer(case: Case) -> Sequence[Any]:
        pairs = [(case["query"], document) for document in case["documents"]]
        scores: Sequence[Any] = network.predict(pairs, activation_fn=torch.nn.Sigmoid())
        return scores

    return answer


def listwise(spec: ModelSpec, directory: str) -> Answer:
    """jina-reranker-v3, which answers with the best first."""
    network = _remote(directory)

    def answer(case: Case) -> Sequence[Any]:
        ranked = network.rerank(case["query"], list(case["documents"]))
        return [result["relevance_score"] for result in sorted(ranked, key=lambda result: result["index"])]

    return answer


def reranker_m0(spec: ModelSpec, directory: str) -> Answer:
    """jina-reranker-m0, which is told what kind each side is of."""
    network = _remote(directory)

    def answer(case: Case) -> Sequence[Any]:
        query, documents = _open(case["query"]), [_open(value) for value in case["documents"]]
        kinds = {
            f"{side}_type": "text" if isinstance(value, str) else "image"
            for side, value in (("query", query), ("doc", documents[0]))
        }
        return list(np.atleast_1d(network.compute_score([(query, document) for document in documents], **kinds)))

    return answer


JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
JUDGED = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def yes_or_no(spec: ModelSpec, directory: str) -> Answer:
    """Qwen3-Reranker, as its model card says: a prompt, and the next token's odds of yes against no."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModelForCausalLM.from_pretrained(directory, **_WEIGHTS).eval()
    answers = tokenizer.convert_tokens_to_ids(["no", "yes"])

    @torch.inference_mode()
    def score(query: str, document: str) -> float:
        body = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        ids = [i for text in (JUDGE, body, JUDGED) for i in tokenizer.encode(text, add_special_tokens=False)]
        return float(network(torch.tensor([ids])).logits[0, -1, answers].softmax(-1)[1])

    return lambda case: [score(case["query"], document) for document in case["documents"]]


_OWN: Mapping[str, Publisher] = {
    "bge-m3": bge_m3,
    "jina-clip-v1": clip,
    "jina-clip-v2": clip,
    "jina-embeddings-v4": embeddings_v4,
    "jina-reranker-v3": listwise,
    "jina-reranker-v3.5": listwise,
    "jina-reranker-m0": reranker_m0,
    "qwen3-reranker-0.6b": yes_or_no,
    "qwen3-reranker-4b": yes_or_no,
}


def _remote(directory: str) -> Any:
    """The class that a repository brings."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory, trust_remote_code=True, **_WEIGHTS).eval()


def _task(spec: ModelSpec, case: Case) -> Task:
    return spec.tasks[case["task"]] if case["task"] else Task()


def _open(value: Any) -> Any:
    """A text as it is, a picture as the publishers' code takes it."""
    from PIL import Image

    return value if isinstance(value, str) else Image.open(io.BytesIO(base64.b64decode(value["image"]))).convert("RGB")
