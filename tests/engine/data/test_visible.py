from engine.data.visible import visible


def test_control_characters_are_spelt_out_and_text_stays():
    assert visible("naïve 日本\n\ttab 😀 é") == "naïve 日本\n\ttab 😀 é"
    assert visible("\x1b[2J\x00\r\x7f\x85\u2066") == r"\x1b[2J\x00\r\x7f\x85\u2066"
