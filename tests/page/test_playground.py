"""What is asked in the playground."""

from __future__ import annotations

from lorakit.server.page.screens.playground import mix_text


def test_a_mix_of_sliders_is_written_as_a_model_is() -> None:
    assert mix_text(["sql", "chat", "code"], ["0.70", "0.3", "0.00"]) == "mix(sql=0.7,chat=0.3)"
    assert mix_text(["sql", "sql", ""], ["0.1", "0.2", "1"]) == "mix(sql=0.3)"
    assert mix_text(["sql", "chat"], ["x", "-0.5"]) == "mix(chat=-0.5)"
