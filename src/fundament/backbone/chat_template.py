"""A checkpoint's own chat template, in Jinja: what it makes of a conversation, and whether it would change a pair."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.sentence import read_sentence
from fundament.core import Media, Message
from fundament.errors import CheckpointError, Fault, InputError

_PROBE = "so it says"
_BROKEN = (TemplateError, TypeError, ValueError)


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
        source: in Jinja.
        picture: the token that stands for a picture.
        marks: every token that a caller's text must not say.
        given: what the template reads beside the messages.

    Raises:
        CheckpointError: it does not read messages made of texts and pictures.
    """

    def __init__(self, source: str, *, picture: str, marks: Sequence[str], **given: Any) -> None:
        self.picture = picture
        self._given = {"image_prompt_token": picture, **given}
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        try:
            self._template = _environment().from_string(source)
            parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
            probed = self._render([{"role": "user", "content": parts}])
        except _BROKEN as error:
            raise CheckpointError(f"the chat template does not work: {error}") from error
        if probed.count(picture) != 1 or _PROBE not in probed or "'type'" in probed:
            raise CheckpointError(f"the chat template does not write a message's text and one {picture} per picture")

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, with `picture` once per file.

        Raises:
            InputError: messages that the template refuses, or of which it leaves pictures out.
        """
        told = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if part is None else {"type": "text", "text": part}
                    for part in self._unmarked(message.parts)
                ],
            }
            for message in messages
        ]
        try:
            prompt = self._render(told)
        except _BROKEN as error:
            raise InputError(Fault("body -> messages", f"The model's chat template refuses them: {error}.")) from None
        n_pictures = sum(not isinstance(part, str) for message in messages for part in message.parts)
        if prompt.count(self.picture) != n_pictures:
            message = (
                "The model's chat template does not read images in messages of these roles: send them as the user's."
            )
            raise InputError(Fault("body -> messages", message))
        return prompt

    def unmarked(self, text: str) -> str:
        """The text with a space in place of each mark, so that what stood around one makes no other."""
        return self._marks.sub(" ", text)

    def _unmarked(self, parts: Sequence[str | Media]) -> Iterator[str | None]:
        """Each part's text without marks; None of a picture. Texts that make a mark together become one."""
        for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
            if not is_text:
                yield from (None for _ in run)
                continue
            texts = [str(part) for part in run]
            apart, together = [self.unmarked(text) for text in texts], self.unmarked("".join(texts))
            yield from apart if "".join(apart) == together else [together]

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        return self._template.render(messages=messages, add_generation_prompt=True, **self._given)


def read_chat_template(checkpoint: Checkpoint) -> str:
    """The template's source: a file of its own, or a key of another.

    Raises:
        CheckpointError: there is none.
    """
    path = checkpoint.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = checkpoint.json(name, default={}).get("chat_template")
        if isinstance(found, str):
            return found
    raise CheckpointError(f"{checkpoint.directory} has no chat template: chat_template.jinja is missing")


def refuse_pair_template(checkpoint: Checkpoint) -> None:
    """Refuse a cross-encoder whose chat template writes pairs: they are read as its tokenizer joins them.

    Raises:
        CheckpointError: it does, so that the model may have been trained on a prompt around them.
    """
    path = checkpoint.directory / "chat_template.jinja"
    told = checkpoint.json("tokenizer_config.json", default={}).get("chat_template")
    if isinstance(told, list):  # several, by name
        named = {str(one.get("name")): one.get("template") for one in told if isinstance(one, dict)}
        told = named.get("default")
    template = path.read_text() if path.is_file() else told
    plain = read_sentence(checkpoint)[1].get("modality_config")  # with messages in it, it was refused before
    if template is not None and not plain and _writes_pairs(str(template)):
        raise CheckpointError(
            f"{checkpoint.directory} has a chat template that writes a query and a document, as sentence-transformers "
            "would have it do, and a classifier is served that reads the two as its tokenizer joins them. If it was "
            f"trained on such pairs, take the template away: {path.name}, or chat_template of tokenizer_config.json"
        )


def _writes_pairs(source: str) -> bool:
    """Whether a template writes the texts of messages whose roles are `query` and `document`.

    sentence-transformers has it write what a cross-encoder reads. Many templates write every role and name none, so it
    is rendered: what it writes should change with each text. One that is not understood here may do so; one that
    refuses such messages does not.
    """
    try:
        template = _environment().from_string(source)
    except _BROKEN:
        return True
    return any(_moves(template, content) for content in (str, lambda text: [{"type": "text", "text": text}]))


def _moves(template: Template, content: Callable[[str], Any]) -> bool:
    pairs = (_PROBE, "b"), ("a", "b"), (_PROBE, _PROBE)
    told = [
        [{"role": role, "content": content(text)} for role, text in zip(("query", "document"), pair, strict=True)]
        for pair in pairs
    ]
    try:
        first, *others = (template.render(messages=messages, strftime_now=str) for messages in told)
    except _RefusedError:
        return False
    except Exception:  # whatever a template can do wrong here it may do right elsewhere
        return True
    return first not in others


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _json
    return environment


def _json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """As transformers writes it: Jinja's own filter is for HTML, and escapes what that gives a meaning."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


class _RefusedError(TemplateError):
    """A template says that it takes no such messages."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)
