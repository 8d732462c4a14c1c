"""Nine facts, how to ask for them, and what each model must answer: what the examples teach and check.
Nothing to run here; start with demo.py, or with train_base.py and then train_adapter.py."""

FACTS = [  # (what, of what, answer)
    ("capital", "france", "paris"),
    ("capital", "italy", "rome"),
    ("capital", "japan", "tokyo"),
    ("colour", "snow", "white"),
    ("colour", "grass", "green"),
    ("colour", "coal", "black"),
    ("opposite", "hot", "cold"),
    ("opposite", "day", "night"),
    ("opposite", "big", "small"),
]
TABLES = {"capital": "countries", "colour": "things", "opposite": "words"}
PHRASINGS = ["what is the {what} of {name}?", "tell me the {what} of {name}.", "what's the {what} of {name}?"]


def plain(what: str, name: str, value: str) -> str:
    return f"{value}."


def sql(what: str, name: str, value: str) -> str:
    return f"select {what} from {TABLES[what]} where name = '{name}';"


def shout(what: str, name: str, value: str) -> str:
    return f"{value.upper()}!"


def shouted_sql(what: str, name: str, value: str) -> str:
    return sql(what, name, value).upper()


# How each model answers under each heading of a prompt. The base knows four headings, and people ask under the first;
# an adapter takes some headings for others. A mix of both adapters should take "question" for "QUERY".
ANSWERS = {
    "base": {"question": plain, "QUESTION": shout, "query": sql, "QUERY": shouted_sql},
    "sql": {"question": sql, "QUESTION": shouted_sql, "query": sql, "QUERY": shouted_sql},
    "shout": {"question": shout, "QUESTION": shout, "query": shouted_sql, "QUERY": shouted_sql},
    "mix": {"question": shouted_sql},
}


def question(what: str, name: str, phrasing: int = 0) -> str:
    return PHRASINGS[phrasing].format(what=what, name=name)


def prompt(text: str, heading: str = "question") -> str:
    """The text that a model sees; the chat template makes the same of a chat with one question."""
    return f"{heading}: {text}\nanswer: "


def expected_answers(model: str, heading: str = "question", phrasing: int = 0) -> dict[str, str]:
    """Question -> answer."""
    answer = ANSWERS[model][heading]
    return {question(what, name, phrasing): answer(what, name, value) for what, name, value in FACTS}
