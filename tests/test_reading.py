"""Files of users and strangers: within limits, and strict about what JSON is."""

import json

import pytest

from hf_model.reading import parse_json


class TestStrictJSON:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("1e999", "too large"),
            ("[NaN]", "NaN"),
            ("-Infinity", "Infinity"),
            ("9" * 5000, "5000 digits"),
            ("[" * 101 + "]" * 101, "deeper than 100"),
            ('{"a":' * 10**5 + "1" + "}" * 10**5, "deeper than 100"),
            ("{", "Expecting"),
        ],
        ids=str,
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_json(text)

    def test_reads_the_rest(self) -> None:
        text = '{"a": [1, -2.5e3, "\\ud83d", null, true, {}], "b": ' + "[" * 98 + "]" * 98 + "}"
        assert parse_json(text) == json.loads(text)
