"""English-like text of our own making, the same on every machine, in any number of tokens.

Sentences are drawn from patterns and word lists, so that they split into words and word pieces as prose does. Lengths
are in tokens of the embedded model's tokenizer, special tokens included.

Run it to see samples: `python benchmarks/corpus.py`.
"""

from collections.abc import Iterator
from functools import cache
from random import Random

from tokenizers import Tokenizer

from fundament.engine.weights import Local, embedded

N_SPECIAL = 2  # [CLS] and [SEP]

# Entries of one or several words, separated by `|`.
_LISTS = {
    "noun": """harbour|orchard|library|engine|archive|lantern|glacier|market|bridge|kitchen|satellite|bakery|compiler|
        vineyard|telescope|museum|railway|turbine|greenhouse|ledger|observatory|aquarium|courtyard|printer|reservoir|
        catalogue|workshop|lighthouse|database|monastery|thermostat|warehouse|festival|parliament|microscope|quarry|
        hospital|newspaper|laboratory|violin|sailboat|battery|contract|hedge|tunnel|pharmacy|studio|granary""",
    "plural": """sailors|beekeepers|engineers|letters|apples|chemists|measurements|carpenters|passengers|antibodies|
        recipes|photographs|merchants|signals|storks|invoices|teachers|volcanoes|documents|musicians|spreadsheets|
        subscribers|fossils|translators|mushrooms|regulators|cyclists|sensors|poems|volunteers|prototypes|tenants""",
    "adjective": """quiet|reliable|weathered|enormous|transparent|ancient|electric|unfinished|colourful|narrow|
        bilingual|frozen|experimental|crowded|portable|medieval|forgotten|seasonal|symmetrical|waterproof|provincial|
        inexpensive|autonomous|muddy|well-lit|temporary|underground|honest|triangular|biodegradable""",
    "verb": """repaired|described|counted|followed|painted|measured|borrowed|translated|discovered|inspected|
        delivered|rearranged|photographed|financed|dismantled|remembered|indexed|overlooked|restored|questioned|
        summarised|postponed|decorated|calibrated|auctioned|defended""",
    "base": """repair|describe|measure|translate|restore|inspect|calibrate|clean|insure|store|photograph|compare|rent|
        recycle|paint|move|heat|catalogue|finance|label""",
    "person": """Marguerite|Tobias|Ingrid|Anselm|Priya|Okonkwo|Yusuf|Leonie|Bartholomew|Chiara|Mateusz|Halldóra|
        Esperanza|Nikolai|Wanjiru|Dominic""",
    "place": """near the old mill|behind the town hall|on the northern coast|in the basement|across the valley|
        at the end of the street|between two rivers|under the railway arches|in Rotterdam|outside Valparaíso|
        on the third floor|beyond the marshes""",
    "time": """Last autumn|Before dawn|In 1987|After a long debate|Every other Thursday|During the storm|
        By the end of March|Two years later|While nobody was looking|At half past six""",
    "number": "two|seven|a dozen|forty-three|119|1,250|nearly 6,000|several|no fewer than ten",
    "adverb": "carefully|reluctantly|twice|overnight|anonymously|in silence|again|by hand",
    "state": """had been closed since winter|was far too small|no longer met the requirements|
        smelled of cedar and salt|cost less than expected|needed a second opinion|ran without interruption|
        belonged to everybody""",
}
_WORDS = {kind: [entry.strip() for entry in entries.split("|")] for kind, entries in _LISTS.items()}

_SENTENCES = (
    "The {adjective} {noun} {place} {state}.",
    "{time}, {person} {verb} the {noun} {adverb}.",
    "{person} and {number} {plural} {verb} a {adjective} {noun} {place}.",
    "Nobody {verb} the {plural}, because the {noun} {state}.",
    "{time} the {plural} {verb} {number} {adjective} {plural}; the {noun} {state}.",
    "Although the {noun} {state}, {person} {verb} it {adverb}.",
    "Is there a {adjective} {noun} {place} that {person} has not {verb}?",
    '"We {verb} the {noun}," said {person}, "and the {plural} {verb} us."',
    "A {noun} is {adjective} when its {plural} are {adjective} (see chapter {number}).",
    "Between the {noun} and the {noun}, {number} {plural} were {verb} {adverb}.",
)

_QUERIES = (
    "how to {base} a {adjective} {noun}",
    "where to {base} {plural} {place}",
    "{adjective} {noun} for {plural}",
    "who {verb} the {noun} {place}",
    "cost to {base} {number} {plural}",
    "{noun} or {noun} {place}",
    "why {plural} {base} a {noun}",
    "{person} {noun} {adjective} {plural}",
)

_FILLERS = ("again", "there", "then", "too", "here", "now")  # one token each


@cache
def model() -> Local:
    """The embedded model's directory.

    Raises:
        SystemExit: it is not installed.
    """
    local = embedded()
    if local is None:
        raise SystemExit("The embedded model is not installed; run `make test` or `make install` first.")
    return local


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model().directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def count(text: str) -> int:
    """Tokens of a text, special tokens included."""
    return len(_tokenizer().encode(text).ids)


@cache
def _cost(word: str) -> int:
    return len(_tokenizer().encode(word, add_special_tokens=False).ids)


def _fill(pattern: str, random: Random) -> str:
    pieces = pattern.split("{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        kind, _, rest = piece.partition("}")
        filled += (random.choice(_WORDS[kind]), rest)
    return "".join(filled)


def _words(random: Random) -> Iterator[str]:
    while True:
        yield from _fill(random.choice(_SENTENCES), random).split()


def text_of(n_tokens: int, random: Random) -> str:
    """Prose of exactly `n_tokens` tokens, special tokens included; at least `N_SPECIAL`, which is the empty text."""
    words, left = [], n_tokens - N_SPECIAL
    for word in _words(random):
        if _cost(word) > left:
            break
        words.append(word)
        left -= _cost(word)
    # What is left is less than one word: words of one token fill it.
    return " ".join([*words, *random.choices(_FILLERS, k=left)])


def texts(n: int, *, shortest: int = 10, longest: int = 256, seed: int = 1) -> list[str]:
    """`n` texts whose lengths are uniform between `shortest` and `longest` tokens."""
    random = Random(seed)
    return [text_of(random.randint(shortest, longest), random) for _ in range(n)]


def queries(n: int, *, seed: int = 2) -> list[str]:
    """`n` search queries of a few words."""
    random = Random(seed)
    return [_fill(random.choice(_QUERIES), random) for _ in range(n)]


def main() -> None:
    """Show samples, and that every length is met."""
    sample = texts(2_000)
    lengths = [count(text) for text in sample]
    print(f"{len(sample):,} texts, {sum(lengths):,} tokens, {min(lengths)} to {max(lengths)} each")
    random = Random(0)
    wrong = [n for n in range(N_SPECIAL, 257) if count(text_of(n, random)) != n]
    print(f"lengths not met exactly: {wrong or 'none'}")
    asked = [count(query) for query in queries(2_000)]
    print(f"queries of {min(asked)} to {max(asked)} tokens, for example {queries(3)}\n")
    print(sample[0])


if __name__ == "__main__":
    main()
