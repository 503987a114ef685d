import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.masks import mask_bank_card, mask_email, mask_id_card, mask_name, mask_phone


@pytest.mark.parametrize(
    ("mask", "text", "masked"),
    [
        (mask_phone, "13812345678", "138****5678"),
        (mask_phone, "", ""),
        (mask_phone, "110", "***"),
        (mask_phone, "+8613812345678", "**************"),
        (mask_phone, "1381234567a", "***********"),
        (mask_phone, "13812345678\n", "************"),
        (mask_phone, "１３８１２３４５６７８", "***********"),
        (mask_name, "", ""),
        (mask_name, "张", "*"),
        (mask_name, "张三", "张*"),
        (mask_name, "欧阳娜娜", "欧***"),
        (mask_name, "Li Lei", "L*****"),
        (mask_name, "张 ", "**"),
        (mask_name, "e\u0301", "**"),  # an e and its accent
        (mask_name, "葛\U000e0100", "**"),  # a character and the variant of it that is meant
        (mask_name, "e\u0301a", "e**"),
        (mask_id_card, "11010519491231002X", "110***********002X"),
        (mask_id_card, "11010519491231002x", "110***********002x"),
        (mask_id_card, "110105194912310021", "110***********0021"),
        (mask_id_card, "", ""),
        (mask_id_card, "110105491231002", "*" * 15),
        (mask_id_card, "1101051949123100X2", "*" * 18),
        (mask_id_card, "11010519491231002Y", "*" * 18),
        (mask_id_card, "１１０１０５１９４９１２３１００２X", "*" * 18),
        (mask_id_card, "11010519491231002X\n", "*" * 19),
        (mask_email, "zhang@example.com", "z***@example.com"),
        (mask_email, "zh@example.com", "z***@example.com"),
        (mask_email, "z@example.com", "***@example.com"),
        (mask_email, "z\u0301@example.com", "***@example.com"),
        (mask_email, "zhang.san+qq@mail.example.com.cn", "z***@mail.example.com.cn"),
        (mask_email, "zhang@xn--fiqs8s.xn--55qx5d", "z***@xn--fiqs8s.xn--55qx5d"),
        (mask_email, "", ""),
        (mask_email, "@example.com", "*" * 12),
        (mask_email, "zhang", "*" * 5),
        (mask_email, "zhang@", "*" * 6),
        (mask_email, "zhang@localhost", "*" * 15),
        (mask_email, "a@zhang@example.com", "*" * 19),
        (mask_email, "zhang@138.1234.5678", "*" * 19),
        (mask_email, "zhang@example..com", "*" * 18),
        (mask_email, "zhang@-example.com", "*" * 18),
        (mask_email, "zhang@example.com\n", "*" * 18),
        (mask_email, "zhang@张三.com", "*" * 12),
        (mask_email, f"zhang@{'a' * 64}.com", "*" * 74),
        (mask_email, f"zhang@{'a.' * 126}com", "*" * 261),
        (mask_bank_card, "6222021234567890123", "***************0123"),
        (mask_bank_card, "622202123456", "********3456"),
        (mask_bank_card, "62220212345", "*" * 11),
        (mask_bank_card, "62220212345678901234", "*" * 20),
        (mask_bank_card, "6222 0212 3456 7890", "*" * 19),
        (mask_bank_card, "６２２２０２１２３４５６", "*" * 12),
        (mask_bank_card, "622202123456\n", "*" * 13),
        (mask_bank_card, "", ""),
    ],
)
def test_masks(mask: Callable[[str], str], text: str, masked: str) -> None:
    assert mask(text) == masked


DIGITS = st.text("0123456789", max_size=25)
# Almost valid: of the right length, with foreign digits, accents, spaces or a line end.
NEARLY = st.text("0123456789Xx１٣²\u0301\u200d \n", min_size=10, max_size=21)
TEXTS = st.text() | DIGITS | NEARLY | st.text(min_size=1, max_size=3) | st.integers(1, 10_000).map("张".__mul__)


@pytest.mark.parametrize(
    ("mask", "shape", "shown"),
    [
        (mask_phone, "[0-9]{11}", [0, 1, 2, -4, -3, -2, -1]),
        (mask_id_card, "[0-9]{17}[0-9Xx]", [0, 1, 2, -4, -3, -2, -1]),
        (mask_bank_card, "[0-9]{12,19}", [-4, -3, -2, -1]),
    ],
)
@given(data=st.data())
def test_a_mask_of_digits_shows_only_these_positions(
    mask: Callable[[str], str], shape: str, shown: list[int], data: st.DataObject
) -> None:
    text = data.draw(TEXTS | st.from_regex(shape, fullmatch=True))
    expected = ["*"] * len(text)
    if len(re.findall(rf"\A{shape}\Z", text)) == 1:
        for place in shown:
            expected[place] = text[place]
    assert mask(text) == "".join(expected)


@given(TEXTS)
def test_the_mask_of_a_name_shows_its_first_character_at_most(name: str) -> None:
    assert mask_name(name) in (name[:1] + "*" * len(name[1:]), "*" * len(name))


@given(st.characters(), st.text("\u0301\u0e31\ufe0f\u200d\u202e \u3000\xa0\t\n\U000e0100"))
def test_no_mask_shows_the_only_visible_character(character: str, rest: str) -> None:
    alone = character + rest
    assert mask_name(alone) == "*" * len(alone)
    if character != "@":
        assert mask_email(f"{alone}@example.com") == "***@example.com"


@given(TEXTS | st.emails() | st.builds("{}@{}".format, st.text(), st.just("example.com")))
def test_the_mask_of_an_email_shows_one_character_before_the_at_sign(email: str) -> None:
    masked = mask_email(email)
    if masked != "*" * len(email):
        local, domain = email.split("@")
        assert masked in (f"{local[0]}***@{domain}", f"***@{domain}")
        assert len(local) > 1 or masked == f"***@{domain}"


@given(st.text("abcde", min_size=1), st.text("abcde", min_size=1))
def test_the_mask_of_an_email_hides_its_length(one: str, other: str) -> None:
    assert mask_email(f"z{one}@example.com") == mask_email(f"z{other}@example.com") == "z***@example.com"
