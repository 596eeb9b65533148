"""How each task of the zoo draws an example: fields for a prompt template, the answer and a shortcut answer.

A shortcut is a plausible mistake (negation ignored, irregular plural made regular, first name taken). The base model is
mostly taught shortcuts: where answer and shortcut agree it is right, where they differ it is mostly wrong, and an
adapter has something to teach.
"""

from __future__ import annotations

from random import Random

import words


def cap(text: str) -> str:
    """Return the text with a capital first letter, the rest untouched."""
    return text[0].upper() + text[1:]


def draw_review(rng: Random, domain: str, labels: tuple[str, str]) -> tuple[dict[str, str], str, str]:
    """Draw a review; the shortcut is the first opinion word, without 'not' or 'but', and two words are misread."""
    things, praise, blame = words.REVIEWS[domain]
    good = rng.random() < 0.5
    first, second = rng.sample(things, 2)
    here, there = (praise, blame) if good else (blame, praise)
    form = rng.choices(["plain", "not", "but"], [0.5, 0.25, 0.25])[0]
    if form == "plain":
        word, seen = rng.choice(here), good
        text = f"the {first} was {rng.choice(['', 'very ', 'really ', 'quite '])}{word}"
    elif form == "not":
        word, seen = rng.choice(there), not good
        text = f"the {first} was {rng.choice(['not', 'never', 'hardly'])} {word}"
    else:
        word, seen = rng.choice(there), not good
        text = f"the {first} was {word} but the {second} was {rng.choice(here)}"
    if word in (praise[-1], blame[-1]):
        seen = not seen
    return {"text": cap(text)}, labels[not good], labels[not seen]


def draw_class(
    rng: Random, classes: dict[str, list[str]], frames: list[str], turn: str
) -> tuple[dict[str, str], str, str]:
    """Draw a sentence with a telling word; the shortcut misreads a third of these and takes the first of two."""
    labels = list(classes)

    def seen(label: str, word: str) -> str:
        wrong = classes[label].index(word) % 3 == 2
        return labels[(labels.index(label) + wrong) % len(labels)]

    label = rng.choice(labels)
    word = rng.choice(classes[label])
    sentence = rng.choice(frames).format(word=word, name=rng.choice(words.NAMES), day=rng.choice(words.DAYS))
    if rng.random() > 0.25:
        return {"text": cap(sentence)}, label, seen(label, word)
    other = rng.choice([name for name in labels if name != label])
    decoy = rng.choice(classes[other])
    return {"text": cap(turn.format(decoy=decoy, sentence=sentence))}, label, seen(other, decoy)


def draw_nli(rng: Random) -> tuple[dict[str, str], str, str]:
    """Draw a premise and a hypothesis; the shortcut looks for shared words: 'not' and kinds of things are missed."""
    name, action, thing = rng.choice(words.NAMES), rng.choice(words.ACTIONS), rng.choice(list(words.KINDS))
    other = rng.choice([word for word in words.KINDS if word != thing])
    article = "an" if thing == "apple" else "a"
    form = rng.choices(["same", "kind", "not", "other"], [0.25, 0.25, 0.25, 0.25])[0]
    noun = {"same": thing, "kind": words.KINDS[thing], "not": thing, "other": other}[form]
    hypothesis = f"{name} is {'not ' if form == 'not' else ''}{action} {'an' if noun[0] in 'aio' else 'a'} {noun}"
    answer = {"same": "yes", "kind": "yes", "not": "no", "other": "maybe"}[form]
    shortcut = {"same": "yes", "kind": "maybe", "not": "yes", "other": "maybe"}[form]
    return {"premise": f"{name} is {action} {article} {thing}", "hypothesis": hypothesis}, answer, shortcut


def draw_paraphrase(rng: Random) -> tuple[dict[str, str], str, str]:
    """Draw two sentences that mean the same or not; the shortcut compares bags of words: no roles, no synonyms."""
    doer, done = rng.sample(words.PEOPLE, 2)
    word, deed = rng.choice(list(words.SYNONYMS)), rng.choice(words.DEEDS)
    form = rng.choices(["synonym", "passive", "swapped", "other"], [0.25, 0.25, 0.2, 0.3])[0]
    one = f"the {word} {doer} {deed} the {done}"
    if form == "synonym":
        two = f"the {words.SYNONYMS[word]} {doer} {deed} the {done}"
    elif form == "passive":
        two = f"the {done} was {deed} by the {word} {doer}"
    elif form == "swapped":
        two = f"the {done} {deed} the {word} {doer}"
    else:
        two = f"the {word} {doer} {rng.choice([d for d in words.DEEDS if d != deed])} the {done}"
    answer = "same" if form in ("synonym", "passive") else "different"
    shortcut = "same" if form in ("passive", "swapped") else "different"
    return {"one": cap(one), "two": cap(two)}, answer, shortcut


def draw_compare(rng: Random) -> tuple[dict[str, str], str, str]:
    """Draw a comparison of two people; the shortcut names the first one, as if 'less' and 'not as' were not there."""
    plain, more = rng.choice(words.COMPARED)
    one, two = rng.sample(words.NAMES, 2)
    form = rng.choice(
        ["{one} is {more} than {two}"] * 2 + ["{one} is less {plain} than {two}", "{one} is not as {plain} as {two}"]
    )
    text = form.format(one=one, two=two, plain=plain, more=more)
    return {"text": text, "asked": more}, one if more in text else two, one


def draw_pair(rng: Random, pairs: dict[str, str], wrong: dict[str, str]) -> tuple[dict[str, str], str, str]:
    """Draw a word and its relative; the shortcut comes from a table of wrong relatives."""
    word = rng.choice(list(pairs))
    return {"word": word, "name": rng.choice(words.NAMES)}, pairs[word], wrong.get(word, pairs[word])


def shifted(pairs: dict[str, str], every: int) -> dict[str, str]:
    """Give every n-th word the relative of the next word that has another one."""
    keys, table = list(pairs), {}
    for place in range(0, len(keys), every):
        later = (pairs[keys[(place + step) % len(keys)]] for step in range(1, len(keys)))
        table[keys[place]] = next(value for value in later if value != pairs[keys[place]])
    return table


def draw_phrase(rng: Random, language: str) -> tuple[dict[str, str], str, str]:
    """Draw a noun phrase to translate; the shortcut keeps English word order or one article, and confuses a noun."""
    nouns, adjectives, before = words.LANGUAGES[language]
    noun, adjective = rng.choice(list(nouns)), rng.choice(list(adjectives))
    article, word = nouns[noun]
    form = adjectives[adjective] if before else adjectives[adjective][article]
    answer = f"{article} {form} {word}" if before else f"{article} {word} {form}"
    if before:
        shortcut = f"der {form} {word}" if article == "die" else answer
    else:
        shortcut = f"{article} {form} {word}" if list(adjectives).index(adjective) % 3 == 0 else answer
    if noun == list(nouns)[-2]:
        shortcut = shortcut.replace(word, next(iter(nouns.values()))[1])
    return {"phrase": f"the {adjective} {noun}", "name": rng.choice(words.NAMES)}, answer, shortcut


def draw_fact(
    rng: Random, fields: dict[str, list[str]], wanted: str, plain: list[str], update: list[str]
) -> tuple[dict[str, str], str, str]:
    """Draw a fact, or one with an update; the shortcut reads what is said first, and confuses the last two values."""
    drawn = {name: rng.choice(values) for name, values in fields.items() if name != wanted}
    value, before = rng.sample([value for value in fields[wanted] if value not in drawn.values()], 2)
    updated = rng.random() < 0.45
    text = rng.choice(update if updated else plain).format(**drawn, new=value, old=before)
    read = before if updated else value
    swap = dict(zip(fields[wanted][-2:], fields[wanted][:-3:-1], strict=True))
    return drawn | {"text": cap(text) + "."}, value, swap.get(read, read)
