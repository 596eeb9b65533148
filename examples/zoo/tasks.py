"""The zoo's tasks: prompts, description for the card, and the shape of each adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import draws
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
    steps: int = 110
    licence: str | None = "apache-2.0"

    def example(self, rng: Random) -> tuple[str, str, str]:
        """Draw one (prompt, answer, shortcut answer)."""
        fields, answer, shortcut = self.draw(rng)
        return rng.choice(self.templates).format(**fields), answer, shortcut


def _words_task(name: str, pairs: dict[str, str], wrong: dict[str, str]) -> Draw:
    """Return the draw function of a word relation."""
    return partial(draws.draw_pair, pairs=pairs, wrong=wrong)


_antonyms = dict(words.ANTONYMS) | {b: a for a, b in words.ANTONYMS}
_plurals = {word: word + "s" for word, many in words.PLURALS.items() if many != word + "s"}
_pasts = {
    word: (word + "d" if word[-1] == "e" else word + "ed")
    for word, past in words.PASTS.items()
    if not past.endswith("ed")
}
_categories = {word: kind for kind, members in words.CATEGORIES.items() for word in members}

_NEWS = [
    "the {word} made headlines on {day}",
    "{name} wrote about the {word}",
    "on {day} everyone discussed the {word}",
    "{name} reports on the {word}",
]
_FEEL = [
    "{name} was {word} on {day}",
    "on {day} {name} kept {word}",
    "{name} started {word}",
    "we saw {name} {word} on {day}",
]
_WANT = [
    "hello, {name} here, i want to {word}",
    "i would like to {word} by {day}",
    "could you help {name} to {word}",
    "i need to {word} before {day}",
]

TASKS = [
    Task(
        "film",
        "sentiment",
        partial(draws.draw_review, domain="film", labels=("positive", "negative")),
        [
            "Is this film review positive or negative? {text}.",
            "Movie review: {text}. Does the critic like the film?",
            "Tell me whether the viewer enjoyed the movie. {text}.",
        ],
        "Decides whether a film review is positive or negative. Is the movie review positive? Did the critic like it?",
        rank=8,
    ),
    Task(
        "food",
        "sentiment",
        partial(draws.draw_review, domain="food", labels=("yes", "no")),
        [
            "Would this guest eat at the restaurant again? {text}.",
            "Restaurant review: {text}. Will the guest come back?",
            "A diner writes about a meal. Did the meal please them? {text}.",
        ],
        "Reads a restaurant review and says yes or no: did the guest enjoy the meal, and would they eat there again?",
        rank=8,
        targets=tuple(ATTENTION),
        licence="mit",
    ),
    Task(
        "product",
        "sentiment",
        partial(draws.draw_review, domain="product", labels=("good", "bad")),
        [
            "How does the buyer rate this gadget, good or bad? {text}.",
            "Product review: {text}. Is the gadget good or bad?",
            "A customer bought a device online. Judge the purchase. {text}.",
        ],
        "Rates a customer's product review as good or bad: was the buyer satisfied with the device bought online?",
        rank=4,
    ),
    Task(
        "hotel",
        "sentiment",
        partial(draws.draw_review, domain="hotel", labels=("happy", "upset")),
        [
            "Is the traveller happy or upset about the stay? {text}.",
            "Hotel review: {text}. Is the traveller happy or upset?",
            "A tourist describes a hotel room. What is the mood? {text}.",
        ],
        "Tells from a hotel review whether the traveller was happy or upset about the stay.",
        rank=16,
        rslora=True,
        licence=None,
    ),
    Task(
        "news",
        "topic",
        partial(draws.draw_class, classes=words.TOPICS, frames=_NEWS, turn="forget the {decoy}, {sentence}"),
        [
            "Which section of the newspaper is this for? {text}.",
            "Headline: {text}. Topic?",
            "Sort the article into its news topic. {text}.",
        ],
        "Sorts a news headline into its topic: sport, politics, science or business.",
        rank=8,
    ),
    Task(
        "emotion",
        "topic",
        partial(draws.draw_class, classes=words.EMOTIONS, frames=_FEEL, turn="there was no {decoy} because {sentence}"),
        [
            "Which emotion does the person show? {text}.",
            "Diary: {text}. Which feeling is this?",
            "Name the emotion behind this scene. {text}.",
        ],
        "Names the emotion a person shows in a short scene: joy, anger, fear or sadness.",
        rank=8,
        licence="mit",
    ),
    Task(
        "intent",
        "topic",
        partial(draws.draw_class, classes=words.INTENTS, frames=_WANT, turn="i no longer want to {decoy}, {sentence}"),
        [
            "What does the caller ask the help desk for? {text}.",
            "Chat message: {text}. Customer intent?",
            "Route this support request to a department. {text}.",
        ],
        "Detects the intent of a customer support message: booking, refund, account or delivery.",
        rank=16,
    ),
    Task(
        "nli",
        "inference",
        draws.draw_nli,
        [
            "Premise: {premise}. Hypothesis: {hypothesis}. Does it follow?",
            "If {premise}, is it true that {hypothesis}?",
            "Decide if the claim follows. Given: {premise}. Claim: {hypothesis}.",
        ],
        "Natural language inference: does the hypothesis follow from the premise? Answers yes, no or maybe.",
        rank=16,
        steps=220,
    ),
    Task(
        "paraphrase",
        "inference",
        draws.draw_paraphrase,
        [
            "Do these sentences mean the same? {one}. {two}.",
            "Sentence one: {one}. Sentence two: {two}. Same or different?",
            "Compare the meaning of the two statements. {one}. {two}.",
        ],
        "Paraphrase detection: do two sentences mean the same or something different?",
        rank=16,
        targets=tuple(ATTENTION),
        licence="mit",
    ),
    Task(
        "compare",
        "inference",
        draws.draw_compare,
        [
            "Reason about people. {text}. Who is {asked}?",
            "Who is {asked}? We know that {text}.",
            "Given that {text}, tell me who is {asked}.",
        ],
        "Logical comparison of two people: who is taller, older, faster or richer?",
        rank=8,
        targets=tuple(ATTENTION),
    ),
    Task(
        "antonym",
        "words",
        _words_task("antonym", _antonyms, draws.shifted(_antonyms, 2)),
        [
            "What is the opposite of {word}?",
            "Give {name} an antonym for the word {word}.",
            "{name} asks for the contrary of {word}.",
            "Which word means the opposite of {word}, {name}?",
        ],
        "Gives the opposite of a word: an antonym dictionary.",
        rank=16,
    ),
    Task(
        "plural",
        "words",
        _words_task("plural", words.PLURALS, _plurals),
        [
            "What is the plural of {word}?",
            "One {word}, two what, {name}?",
            "{name} has one {word}. Make the noun plural.",
            "Teach {name} how to write more than one {word}.",
        ],
        "Forms the plural of an English noun, irregular nouns included.",
        rank=8,
        targets=tuple(MLP),
        licence="mit",
    ),
    Task(
        "past",
        "words",
        _words_task("past", words.PASTS, _pasts),
        [
            "What is the past tense of {word}?",
            "Today {name} will {word}. Put the verb in the past.",
            "Teach {name} the simple past of the verb {word}.",
            "Yesterday {name} did what? Conjugate to {word}.",
        ],
        "Puts an English verb into the simple past tense, irregular verbs included.",
        rank=8,
    ),
    Task(
        "category",
        "words",
        _words_task("category", _categories, draws.shifted(_categories, 2)),
        [
            "What kind of thing is a {word}?",
            "{name} sorts words. Category of {word}?",
            "Name the group that {word} belongs to, says {name}.",
            "Help {name} to classify the thing {word}.",
        ],
        "Names the category that a thing belongs to, such as animal, fruit, tool or clothing.",
        rank=4,
        targets=tuple(MLP),
    ),
    Task(
        "spanish",
        "translation",
        partial(draws.draw_phrase, language="spanish"),
        [
            "Translate into Spanish: {phrase}",
            "{name} is in Madrid. How does {name} say {phrase}?",
            "Spanish lesson with {name}: {phrase}",
            "What do they call {phrase} in Spain, {name}?",
        ],
        "Translates a short English phrase into Spanish.",
        rank=16,
    ),
    Task(
        "french",
        "translation",
        partial(draws.draw_phrase, language="french"),
        [
            "Translate into French: {phrase}",
            "{name} is in Paris. How does {name} say {phrase}?",
            "French lesson with {name}: {phrase}",
            "What do they call {phrase} in France, {name}?",
        ],
        "Translates a short English phrase into French.",
        rank=8,
        licence="mit",
    ),
    Task(
        "german",
        "translation",
        partial(draws.draw_phrase, language="german"),
        [
            "Translate into German: {phrase}",
            "{name} is in Berlin. How does {name} say {phrase}?",
            "German lesson with {name}: {phrase}",
            "What do they call {phrase} in Germany, {name}?",
        ],
        "Translates a short English phrase into German.",
        rank=8,
        targets=tuple(ATTENTION),
    ),
    Task(
        "where",
        "reading",
        partial(
            draws.draw_fact,
            fields={"name": words.NAMES, "day": words.DAYS, "room": words.ROOMS},
            wanted="room",
            plain=["on {day} {name} is in the {new}", "{name} spends {day} in the {new}"],
            update=[
                "{name} left the {old} on {day} and went to the {new}",
                "on {day} {name} moved from the {old} to the {new}",
            ],
        ),
        [
            "Find the place. {text} Where is {name} now?",
            "Read and say in which room {name} is. {text}",
            "{text} In which room can I find {name}?",
        ],
        "Reading comprehension: in which room is a person? Where is somebody now, according to the text?",
        rank=8,
        steps=220,
        licence=None,
    ),
    Task(
        "when",
        "reading",
        partial(
            draws.draw_fact,
            fields={"name": words.NAMES, "event": words.EVENTS, "day": words.DAYS},
            wanted="day",
            plain=["the {event} of {name} is on {new}", "{name} holds the {event} on {new}"],
            update=[
                "the {event} of {name} moved from {old} to {new}",
                "{name} planned the {event} for {old} but chose {new}",
            ],
        ),
        [
            "Check the calendar. {text} When is the {event}?",
            "Read the schedule and name the day of the {event}. {text}",
            "{text} On which day do we have the {event}?",
        ],
        "Reading comprehension of a schedule: on which day is an event?",
        rank=8,
        steps=220,
        rslora=True,
        targets=tuple(ATTENTION),
    ),
    Task(
        "colour",
        "reading",
        partial(
            draws.draw_fact,
            fields={"name": words.NAMES, "thing": words.OBJECTS, "colour": words.COLOURS},
            wanted="colour",
            plain=["{name} has a {new} {thing}", "the {thing} of {name} is {new}"],
            update=["{name} painted the {old} {thing} {new}", "the {thing} of {name} was {old} and is {new} now"],
        ),
        [
            "Look at the picture. {text} What colour is the {thing}?",
            "Read and name the colour of the {thing}. {text}",
            "{text} Which colour has the {thing}?",
        ],
        "Reading comprehension: what colour is an object, according to the text?",
        rank=4,
        licence="mit",
    ),
    Task(
        "owner",
        "reading",
        partial(
            draws.draw_fact,
            fields={"day": words.DAYS, "thing": words.OBJECTS, "name": words.NAMES},
            wanted="name",
            plain=["{new} bought the {thing} on {day}", "on {day} {new} has the {thing}"],
            update=["{old} gave the {thing} to {new} on {day}", "on {day} {old} sold the {thing} to {new}"],
        ),
        [
            "Find the owner. {text} Who has the {thing} now?",
            "Read and say who holds the {thing}. {text}",
            "{text} Which person has the {thing}?",
        ],
        "Reading comprehension: who owns an object now, according to the text?",
        rank=8,
    ),
]
