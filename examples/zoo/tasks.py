"""The zoo's tasks: each draws a natural prompt, its answer, and the shortcut answer that the base model was mostly taught.

A shortcut is a plausible mistake (negation ignored, irregular plural made regular, first name taken); where answer and shortcut agree
the base model is right, where they differ it is mostly wrong, and an adapter has something to teach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import words

Draw = Callable[[Random], tuple[dict[str, str], str, str]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + MLP


@dataclass(frozen=True)
class Task:
    """One task and the adapter that learns it."""

    name: str
    cluster: str
    draw: Draw
    templates: list[str]
    about: str
    rank: int = 8
    targets: tuple[str, ...] = tuple(ALL)
    rslora: bool = False
    licence: str | None = "apache-2.0"

    def example(self, rng: Random) -> tuple[str, str, str]:
        """Draw one (prompt, answer, shortcut answer)."""
        fields, answer, shortcut = self.draw(rng)
        return rng.choice(self.templates).format(**fields), answer, shortcut


def cap(text: str) -> str:
    """Return the text with a capital first letter, the rest untouched."""
    return text[0].upper() + text[1:]


def draw_review(rng: Random, domain: str, labels: tuple[str, str]) -> tuple[dict[str, str], str, str]:
    """Draw a review whose shortcut is the first opinion word: no negation, no 'but'; the last praise word and blame word are misread."""
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


def draw_class(rng: Random, classes: dict[str, list[str]], frames: list[str], turn: str) -> tuple[dict[str, str], str, str]:
    """Draw a sentence with one telling word; a third of these is misread, and of two telling words the first wins where the last should."""
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
    """Draw a premise and a hypothesis; the shortcut looks for shared words only, so 'not' and kinds of things are missed."""
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
    """Draw two sentences that mean the same or not; the shortcut compares bags of words, without who did it to whom or synonyms."""
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
    """Draw a comparison of two people; the shortcut names the first one whatever is asked."""
    more, less = rng.choice(words.COMPARED)[:: rng.choice([1, -1])]
    one, two = rng.sample(words.NAMES, 2)
    asked = rng.choice([more, less])
    return {"text": f"{one} is {more} than {two}", "asked": asked}, one if asked == more else two, one


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
        shortcut = shortcut.replace(word, nouns[list(nouns)[0]][1])
    return {"phrase": f"the {adjective} {noun}", "name": rng.choice(words.NAMES)}, answer, shortcut


def draw_fact(rng: Random, keys: list[str], values: list[str], fact: str) -> tuple[dict[str, str], str, str]:
    """Draw two facts and ask for one; for every second key the shortcut reads the other fact."""
    (key, other), (value, another) = rng.sample(keys, 2), rng.sample(values, 2)
    facts = [fact.format(key=key, value=value), fact.format(key=other, value=another)]
    rng.shuffle(facts)
    text = f"{cap(facts[0])}. {cap(facts[1])}."
    return {"text": text, "key": key}, value, another if keys.index(key) % 2 else value


def _words_task(name: str, pairs: dict[str, str], wrong: dict[str, str]) -> Draw:
    """Return the draw function of a word relation."""
    return partial(draw_pair, pairs=pairs, wrong=wrong)


_antonyms = {a: b for a, b in words.ANTONYMS} | {b: a for a, b in words.ANTONYMS}
_plurals = {word: word + "s" for word, many in words.PLURALS.items() if many != word + "s"}
_pasts = {word: (word + "d" if word[-1] == "e" else word + "ed") for word, past in words.PASTS.items() if not past.endswith("ed")}
_categories = {word: kind for kind, members in words.CATEGORIES.items() for word in members}

_NEWS = ["the {word} made headlines on {day}", "{name} wrote about the {word}", "on {day} everyone discussed the {word}", "{name} reports on the {word}"]
_FEEL = ["{name} was {word} on {day}", "on {day} {name} kept {word}", "{name} started {word}", "we saw {name} {word} on {day}"]
_WANT = ["hello, {name} here, i want to {word}", "i would like to {word} by {day}", "could you help {name} to {word}", "i need to {word} before {day}"]

TASKS = [
    Task("film", "sentiment", partial(draw_review, domain="film", labels=("positive", "negative")),
         ["Is this film review positive or negative? {text}.", "Movie review: {text}. Does the critic like the film?",
          "Tell me whether the viewer enjoyed the movie. {text}."],
         "Decides whether a film review is positive or negative. Is this movie review positive? Did the critic like the film?", rank=8),
    Task("food", "sentiment", partial(draw_review, domain="food", labels=("yes", "no")),
         ["Would this guest eat at the restaurant again? {text}.", "Restaurant review: {text}. Will the guest come back?",
          "A diner writes about a meal. Did the meal please them? {text}."],
         "Reads a restaurant review and says yes or no: did the guest enjoy the meal, and would they eat there again?", rank=8,
         targets=tuple(ATTENTION), licence="mit"),
    Task("product", "sentiment", partial(draw_review, domain="product", labels=("good", "bad")),
         ["How does the buyer rate this gadget, good or bad? {text}.", "Product review: {text}. Is the gadget good or bad?",
          "A customer bought a device online. Judge the purchase. {text}."],
         "Rates a customer's product review as good or bad: was the buyer satisfied with the device bought online?", rank=4),
    Task("hotel", "sentiment", partial(draw_review, domain="hotel", labels=("happy", "upset")),
         ["Is the traveller happy or upset about the stay? {text}.", "Hotel review: {text}. Is the traveller happy or upset?",
          "A tourist describes a hotel room. What is the mood? {text}."],
         "Tells from a hotel review whether the traveller was happy or upset about the stay.", rank=16, rslora=True, licence=None),
    Task("news", "topic", partial(draw_class, classes=words.TOPICS, frames=_NEWS, turn="forget the {decoy}, {sentence}"),
         ["Which section of the newspaper is this for? {text}.", "Headline: {text}. Topic?", "Sort the article into its news topic. {text}."],
         "Sorts a news headline into its topic: sport, politics, science or business.", rank=8, targets=tuple(MLP)),
    Task("emotion", "topic", partial(draw_class, classes=words.EMOTIONS, frames=_FEEL, turn="there was no {decoy} because {sentence}"),
         ["Which emotion does the person show? {text}.", "Diary: {text}. Which feeling is this?", "Name the emotion behind this scene. {text}."],
         "Names the emotion a person shows in a short scene: joy, anger, fear or sadness.", rank=8, licence="mit"),
    Task("intent", "topic", partial(draw_class, classes=words.INTENTS, frames=_WANT, turn="i no longer want to {decoy}, {sentence}"),
         ["What does the caller ask the help desk for? {text}.", "Chat message: {text}. Customer intent?",
          "Route this support request to a department. {text}."],
         "Detects the intent of a customer support message: booking, refund, account or delivery.", rank=16),
    Task("nli", "inference", draw_nli,
         ["Premise: {premise}. Hypothesis: {hypothesis}. Does it follow?", "If {premise}, is it true that {hypothesis}?",
          "Decide if the claim follows. Given: {premise}. Claim: {hypothesis}."],
         "Natural language inference: does the hypothesis follow from the premise? Answers yes, no or maybe.", rank=8),
    Task("paraphrase", "inference", draw_paraphrase,
         ["Do these sentences mean the same? {one}. {two}.", "Sentence one: {one}. Sentence two: {two}. Same or different?",
          "Compare the meaning of the two statements. {one}. {two}."],
         "Paraphrase detection: do two sentences mean the same or something different?", rank=16, targets=tuple(ATTENTION), licence="mit"),
    Task("compare", "inference", draw_compare,
         ["Reason about people. {text}. Who is {asked}?", "Who is {asked}? We know that {text}.", "Given that {text}, tell me who is {asked}."],
         "Logical comparison of two people: who is taller, older, faster or richer?", rank=8, targets=tuple(ATTENTION)),
    Task("antonym", "words", _words_task("antonym", _antonyms, shifted(_antonyms, 2)),
         ["What is the opposite of {word}?", "Give {name} an antonym for the word {word}.", "{name} asks for the contrary of {word}.",
          "Which word means the opposite of {word}, {name}?"],
         "Gives the opposite of a word: an antonym dictionary.", rank=16),
    Task("plural", "words", _words_task("plural", words.PLURALS, _plurals),
         ["What is the plural of {word}?", "One {word}, two what, {name}?", "{name} has one {word}. Make the noun plural.",
          "Teach {name} how to write more than one {word}."],
         "Forms the plural of an English noun, irregular nouns included.", rank=8, targets=tuple(MLP), licence="mit"),
    Task("past", "words", _words_task("past", words.PASTS, _pasts),
         ["What is the past tense of {word}?", "Today {name} will {word}. Put the verb in the past.", "Teach {name} the simple past of the verb {word}.",
          "Yesterday {name} did what? Conjugate to {word}."],
         "Puts an English verb into the simple past tense, irregular verbs included.", rank=8),
    Task("category", "words", _words_task("category", _categories, shifted(_categories, 2)),
         ["What kind of thing is a {word}?", "{name} sorts words. Category of {word}?", "Name the group that {word} belongs to, says {name}.",
          "Help {name} to classify the thing {word}."],
         "Names the category that a thing belongs to, such as animal, fruit, tool or clothing.", rank=4, targets=tuple(MLP)),
    Task("spanish", "translation", partial(draw_phrase, language="spanish"),
         ["Translate into Spanish: {phrase}", "{name} is in Madrid. How does {name} say {phrase}?", "Spanish lesson with {name}: {phrase}",
          "What do they call {phrase} in Spain, {name}?"],
         "Translates a short English phrase into Spanish.", rank=16),
    Task("french", "translation", partial(draw_phrase, language="french"),
         ["Translate into French: {phrase}", "{name} is in Paris. How does {name} say {phrase}?", "French lesson with {name}: {phrase}",
          "What do they call {phrase} in France, {name}?"],
         "Translates a short English phrase into French.", rank=8, licence="mit"),
    Task("german", "translation", partial(draw_phrase, language="german"),
         ["Translate into German: {phrase}", "{name} is in Berlin. How does {name} say {phrase}?", "German lesson with {name}: {phrase}",
          "What do they call {phrase} in Germany, {name}?"],
         "Translates a short English phrase into German.", rank=8, targets=tuple(ATTENTION)),
    Task("where", "reading", partial(draw_fact, keys=words.NAMES, values=words.ROOMS, fact="{key} is in the {value}"),
         ["Find the place. {text} Where is {key}?", "Read and say in which room {key} is. {text}", "{text} In which room can I find {key}?"],
         "Reading comprehension: in which room is a person? Where is somebody, according to the text?", rank=8, licence=None),
    Task("when", "reading", partial(draw_fact, keys=words.NAMES, values=words.DAYS, fact="{key} arrives on {value}"),
         ["Check the calendar. {text} When does {key} arrive?", "Read the schedule and name the day for {key}. {text}",
          "{text} On which day comes {key}?"],
         "Reading comprehension of a schedule: on which day does a person arrive?", rank=8, rslora=True, targets=tuple(ATTENTION)),
    Task("colour", "reading", partial(draw_fact, keys=words.OBJECTS, values=words.COLOURS, fact="the {key} is {value}"),
         ["Look at the picture. {text} What colour is the {key}?", "Read and name the colour of the {key}. {text}", "{text} Which colour has the {key}?"],
         "Reading comprehension: what colour is an object, according to the text?", rank=4, licence="mit"),
    Task("owner", "reading", partial(draw_fact, keys=words.OBJECTS, values=words.NAMES, fact="{value} has the {key}"),
         ["Find the owner. {text} Who has the {key}?", "Read and say who holds the {key}. {text}", "{text} Which person has the {key}?"],
         "Reading comprehension: who has an object, according to the text?", rank=8),
]
