"""What one text says about a base model: a Hub id, a path into a cache, a folder that only guesses can be made of.

Nothing is asked of the Hub or the disk, so the same text always gives the same answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hub_router.sync import published
from hub_router.sync.targets import is_repo_id

_CACHED = re.compile(r"(?:^|/)models--([^/]+?)(?:/(?:snapshots|refs)/([^/]+).*)?/?$")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/([^/\s]+/[^/\s?#]+)(?:[/?#].*)?")
_MODELSCOPE_URL = re.compile(r"https?://(?:www\.)?modelscope\.(?:cn|ai)/models/([^/\s]+/[^/\s?#]+)(?:[/?#].*)?")
_MODELSCOPE_CACHE = re.compile(r"(?:^|/)\.?modelscope(?:/hub)?(?:/models)?/([^/]+/[^/]+)")
_PLACEHOLDER = re.compile(
    r"|none|null|nan|n/a|unknown|todo|tbd|x+|\.+|-+|base[_-]?model(?:[_-]?(?:name|path|id|name_or_path))?"
    r"|model[_-](?:name|path|id|name_or_path)|.*[<>{}$].*|.*\bpath/to/.*|your[_-].*",
    re.IGNORECASE | re.DOTALL,
)
# First parts of relative paths that look like an owner.
_FOLDERS = re.compile(
    r"(?:pre-?trained|base|trained|saved|hf|local|llm|merged|fine-?tuned)?[_-]?(?:models?|weights|checkpoints?|ckpts?)"
    r"|outputs?|out|results?|runs?|logs?|saves?|saved|data|datasets?|experiments?|exps?|work_?dirs?|artifacts?|assets"
    r"|tmp|temp|cache|local|llms?|loras?|adapters?|train(?:ed|ing)?|pretrain(?:ed)?|fine-?tuned|merged|home|root|mnt|opt|usr"
    r"|workspace|content|kaggle|drive|downloads?|src|scripts?",
    re.IGNORECASE,
)
# Last parts that name a state of training, not a model.
_STATES = re.compile(
    r"(?:checkpoint|ckpt|epoch|step|iter|global_step)s?[-_]?\d+.*|(?:final|best|last|latest|merged)(?:[-_].*)?"
    r"|(?:checkpoint|ckpt|snapshot)s?|[0-9a-f]{40}",
    re.IGNORECASE,
)
_QUANTISATION = re.compile(
    r"bnb|gptq|awq|gguf|ggml|exl[23]|hqq|aqlm|autoround|nf4|nvfp4|mxfp[48]|fp[48]|int[48]|[2-8]bits?|w\d+a\d+"
    r"|quantized(?:[._]w\d+a\d+)?|quant",
    re.IGNORECASE,
)
# Words that say more about a quantisation or conversion, and nothing about the model.
_PRECISION = re.compile(r"unsloth|mlx|dwq|dynamic|block|kv|a?sym|g?\d{2,3}g?|bf16|fp16|f16", re.IGNORECASE)
_SHOWN = 200


@dataclass(frozen=True)
class Reading:
    """What one text says.

    Args:
        id (str | None): ``owner/name``, None where the text names no model.
        confidence (str): ``high``, ``medium``, ``low`` or ``none``.
        fact (str): what the text is, to be put after it.
        revision (str | None): commit of that model, where the text names one.
    """

    id: str | None
    confidence: str
    fact: str
    revision: str | None = None


def read_name(text: str) -> Reading:
    """Read one statement of a base model.

    Args:
        text (str): an id, a path, anything.

    Returns:
        Reading: never fails; a text that says nothing gives no id.
    """
    stated = text.strip()
    path = stated.removeprefix("file://").replace("\\", "/").rstrip("/")
    if _PLACEHOLDER.fullmatch(path):
        return Reading(None, "none", "is a placeholder" if path else "is empty")
    url = _URL.fullmatch(path)
    if url and is_repo_id(url[1]):
        return _derived(_of_repo(url[1]), "is a page of the Hub", "high")
    cached = _CACHED.search(path)
    if cached:
        return _of_cache(cached[1], cached[2])
    for reading in (_of_modelscope(path), _of_id(path) if is_repo_id(path) else None):
        if reading:
            return reading
    return _of_path(path) if "/" in path else _of_bare(path)


def canonical_id(model: str) -> str:
    """The id under which adapters of a model are found: that of the original where ``model`` names a copy of it.

    Args:
        model (str): as a user types it.

    Returns:
        str: ``model`` itself where it is no plain Hub id, or is not known by another name.
    """
    found = read_name(model)
    plain = is_repo_id(model) or published.ownerless(model)
    return found.id if plain and found.id and found.confidence in ("high", "medium") else model


def quoted(text: str) -> str:
    """A text from outside for a line of evidence: in quotes, shortened in its middle."""
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]}"
    return repr(short)


def unquantised(name: str) -> tuple[str, bool]:
    """A model's name without what says that it is a quantised or converted copy.

    Args:
        name (str): without owner, such as ``Qwen2.5-7B-Instruct-GPTQ-Int4``.

    Returns:
        tuple[str, bool]: the rest of the name, and whether the name spoke of a quantisation. Models trained for
            quantisation (``qat``) have weights of their own, so their names stay whole.
    """
    joined = re.sub(r"(\d)-bit\b", r"\1bit", name, flags=re.IGNORECASE)
    joined = re.sub(r"[._](?=(?:gguf|ggml|gptq|awq|exl2)\b)", "-", joined, flags=re.IGNORECASE)
    words = joined.split("-")
    if any(word.lower() == "qat" for word in words):
        return name, False
    quantised = False
    if words[0].lower() == "quantized" and len(words) > 1:
        words, quantised = words[1:], True
    while len(words) > 1 and (_QUANTISATION.fullmatch(words[-1]) or _PRECISION.fullmatch(words[-1])):
        quantised |= bool(_QUANTISATION.fullmatch(words.pop()))
    return "-".join(words), quantised


def _derived(found: Reading, fact: str, confidence: str) -> Reading:
    """A reading of an id that was found inside another text, at most as sure as that."""
    surer = ("none", "low", "medium", "high")
    worst = min(found.confidence, confidence, key=surer.index)
    # What the id itself is goes without saying, unless it leads to another one.
    more = "" if found.fact == _PLAIN else f" of a repository that {found.fact}"
    return replace(found, confidence=worst, fact=fact + more)


_PLAIN = "is a Hub id"


def _of_id(model: str) -> Reading:
    """A text of the form ``owner/name``, which a relative path may have as well."""
    owner, _, name = model.partition("/")
    if _FOLDERS.fullmatch(owner):
        return _guess(name, "looks like a relative path")
    if _STATES.fullmatch(name):
        return Reading(model, "low", "has the form of a Hub id, but ends like a folder of checkpoints")
    return _of_repo(model)


def _of_repo(model: str) -> Reading:
    """What is surely a repository of the Hub: itself, what it is called now, or what it is a copy of."""
    found = published.renamed(model)
    if found:
        return Reading(found, "high", f"is called {found} on the Hub today")
    found = published.listed(model)
    return Reading(found, "high", _PLAIN) if found else _of_copy(model)


def _of_copy(model: str) -> Reading:
    """A repository that is not listed: a copy by its owner or its name, or a model of its own."""
    owner, _, name = model.partition("/")
    copier = owner.lower() in published.COPIERS
    stripped, quantised = unquantised(name)
    kind = "quantised copy" if quantised else "copy"
    if published.REARRANGED.fullmatch(model):
        fact = "has its modules arranged otherwise than the original it is a copy of"
        return Reading(f"{owner}/{stripped}", "medium" if quantised else "high", fact)
    own = published.listed(f"{owner}/{stripped}") or published.renamed(f"{owner}/{stripped}")
    found = own or published.original(f"{owner}/{stripped}")
    if not found and (copier or quantised):
        found = published.by_name(stripped)
    if found and (copier or quantised):
        return Reading(found, "medium", f"is a {kind} of {found}")
    if quantised and (owner.lower() == "unsloth" or owner.lower() in published.PUBLISHERS - published.COPIERS):
        parent = f"{owner}/{stripped}"
        return Reading(parent, "medium", f"is a {kind} of {parent}")
    return Reading(
        model, "high", f"{_PLAIN}, by its name a {kind} whose original is not known" if quantised else _PLAIN
    )


def _of_cache(entry: str, snapshot: str | None) -> Reading:
    """A folder of the Hub's cache, ``models--owner--name/snapshots/<commit>``."""
    model = "/".join(entry.split("--"))
    found = _of_repo(model) if is_repo_id(model) else _of_bare(model)
    if not found.id or found.confidence == "low":
        return Reading(None, "none", "is a Hub cache path, but names no model")
    commit = snapshot if snapshot and _SHA.fullmatch(snapshot) else None
    # The commit is one of the repository in the cache, which a copy's original knows nothing of.
    same = found.id.lower() == model.lower() or published.renamed(model) or published.ownerless(model)
    return replace(_derived(found, "is a Hub cache path", "medium"), revision=commit if same else None)


def _of_modelscope(path: str) -> Reading | None:
    """A page or a folder of ModelScope, which writes ``___`` for a dot; None for other texts."""
    page, cached = _MODELSCOPE_URL.fullmatch(path), _MODELSCOPE_CACHE.search(path)
    if page:
        named, fact = page[1], "is a page of ModelScope"
    elif cached:
        if path[cached.end() :].strip("/"):
            return Reading(None, "none", "lies below a folder of ModelScope's cache")
        named, fact = cached[1], "is a ModelScope cache path"
    elif "___" in path.rsplit("/", 1)[-1] and "/" in path:
        named, fact = "/".join(path.split("/")[-2:]), "ends as ModelScope spells a repository"
    else:
        return None
    owner, _, name = named.replace("___", ".").partition("/")
    owner = published.MODELSCOPE_OWNERS.get(owner.lower(), owner)
    model = f"{owner}/{name}"
    if not is_repo_id(model) or _FOLDERS.fullmatch(owner):
        return _guess(name, fact)
    if owner.lower() in published.PUBLISHERS | published.COPIERS:
        return _derived(_of_repo(model), fact, "medium")
    return Reading(model, "low", f"{fact}; the owner may be called otherwise on the Hub")


def _of_path(path: str) -> Reading:
    """Any other path: its last two parts may spell a listed model, its last one may be a listed model's name."""
    owner, name = path.split("/")[-2:]
    found = published.listed(f"{owner}/{name}")
    if found:
        return Reading(found, "medium", "is a path that ends in a known Hub id")
    return _guess(name, "is a path")


def _of_bare(name: str) -> Reading:
    """A name without an owner: an old model's id, else a folder."""
    found = published.ownerless(name)
    if found:
        return Reading(found, "high", f"is called {found} on the Hub today")
    return _guess(name, "has no owner, so it is no Hub id")


def _guess(name: str, fact: str) -> Reading:
    """What a folder's name may stand for."""
    stripped, _ = unquantised(name)
    found = None if _STATES.fullmatch(name) else published.by_name(stripped)
    if found:
        return Reading(found, "low", f"{fact}; guessed from its last part")
    return Reading(None, "none", f"{fact} that names no known model" if fact.startswith("is a") else fact)
