from megachameleon.evaluation.captions import KnownNames, caption_report, comparable
from megachameleon.evaluation.gallery import NamedPrompt


def named(text, key, kind="seen", lang="en"):
    return NamedPrompt(text=text, key=key, kind=kind, lang=lang)


NAMES = [named("red heart", "1"), named("rotes Herz", "1", lang="de"), named("sun", "2"), named("sunflower", "3")]


def test_comparable_forgives_case_space_and_unicode_form():
    assert comparable(" Re\u0301d  HEART ") == "réd heart"


def test_names_are_found_exactly_and_nearly():
    names = KnownNames(NAMES)
    assert names.keys_of("Rotes herz") == {"1"}
    assert names.keys_of("herz") == set()
    assert names.nearest("sunflowers") == ("sunflower", {"3"})
    assert names.nearest("qqq") == ("", set())


def test_report_tells_the_three_measures_apart():
    prompts = [NAMES[0], NAMES[0], NAMES[3], named("sun", "2", kind="held-out tone")]
    report = caption_report(prompts, ["Red heart", "rotes Herz", "sunflwer", "moon"], KnownNames(NAMES))
    seen, held_out, together = report["groups"]
    assert (seen["exact"], seen["any_name"], seen["nearest_name"]) == (1 / 3, 2 / 3, 1.0)
    assert held_out["held_out"]
    assert held_out["exact"] == 0.0
    assert together["prompts"] == 4
    assert report["captions"][2]["nearest"] == "sunflower"
