"""The parser of layout.h accepts its restricted C and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath.layout import LAYOUT, parse, source_directory
from ambient.errors import OurFault

HEAD = "#ifndef X_H\n#define X_H\n#define LAYOUT_VERSION 1\n"
TAIL = "\n#endif\n"


def layout(body: str):
    return parse(HEAD + body + TAIL)


def test_it_understands_constants_enums_and_structs():
    found = layout(
        """
        #define COUNT 3 /* why */
        enum kind { KIND_A = 1, KIND_B = 2, };
        struct one { __u64 a; __u16 b[COUNT]; __u8 pad[2]; };
        _Static_assert(sizeof(struct one) == 16, "one");
        struct two { struct one ones[2]; __u32 c; __u32 pad0; };
        _Static_assert(sizeof(struct two) == 40, "two");
        """
    )
    assert found["COUNT"] == 3
    assert found.names("kind") == {1: "KIND_A", 2: "KIND_B"}
    assert [field.offset for field in found.structs["two"].fields] == [0, 32, 36]
    assert found.classes["two"].ones.offset == 0
    with pytest.raises(KeyError):
        found["NOTHING"]


def test_the_version_names_the_text():
    one, two = layout("/* a */"), layout("/* b */")
    assert one.version.startswith("v1-") and len(one.version) == 11
    assert one.version != two.version


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("#define x 1", "not understood"),
        ("#define X 1 + 1", "not understood"),
        ("#define X 0x10", "not understood"),
        ("#define BIG 4294967296", "does not fit"),
        ("#define A 1\n#define A 2", "defined twice"),
        ("#include <linux/types.h>", "not understood"),
        ("typedef int x;", "not understood"),
        ("int x;", "not understood"),
        ("enum e { A };", "is not NAME = NUMBER"),
        ("enum e { A = 1, B = 1 };", "repeats"),
        ("enum e { A = 1 };\nenum e { B = 1 };", "defined twice"),
        ("struct s { int a; };", "is not a field"),
        ("struct s { __u32 a : 3; };", "is not a field"),
        ("struct s { __u32 *a; };", "is not a field"),
        ("struct s { __u32 a, b; };", "is not a field"),
        ("struct s { __u32 a };", "semicolon"),
        ("struct s { };", "semicolon"),
        ("struct s { struct t a; };", "not defined above"),
        ("struct s { __u8 a[0]; };", "1 to 4096"),
        ("struct s { __u8 a[MANY]; };", "1 to 4096"),
        ("struct s { __u32 a; __u32 a; };", "declared twice"),
        ("struct s { __u8 a; __u32 b; };", "needs explicit padding before"),
        ("struct s { __u32 a; __u8 b; };", "needs explicit padding at its end"),
        ("struct s { __u32 a; };", "no _Static_assert"),
        ('struct s { __u32 a; };\n_Static_assert(sizeof(struct s) == 8, "s");', "has 4 bytes, not 8"),
        ('struct s { __u32 a; };\n_Static_assert(sizeof(struct s) == 4, "t");', "names struct s"),
        (
            'struct s { __u32 a; };\n_Static_assert(sizeof(struct s) == 4, "s");\nstruct s { __u32 a; };',
            "defined twice",
        ),
    ],
)
def test_whatever_else_appears_is_refused_by_name_and_line(body, complaint):
    with pytest.raises(OurFault, match=complaint) as caught:
        layout(body)
    assert str(caught.value).startswith("layout.h")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "include guard"),
        ("#ifndef A_H\n#define B_H\n#endif", "include guard"),
        (HEAD, "not understood"),
        (HEAD + TAIL + "int x;", "nothing may follow"),
        ("#ifndef X_H\n#define X_H\n" + TAIL, "LAYOUT_VERSION"),
    ],
)
def test_the_frame_is_checked_too(text, complaint):
    with pytest.raises(OurFault, match=complaint):
        parse(text)


@given(st.data())
def test_a_damaged_header_is_refused_or_still_consistent(data):
    """Any one change of the real header either fails or gives structs whose offsets add up."""
    text = (source_directory() / "include/layout.h").read_text()
    position = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:position] + data.draw(st.sampled_from(["", "0", ";", "}", "\n", "x"])) + text[position + 1 :]
    try:
        found = parse(damaged)
    except OurFault:
        return
    for struct in found.structs.values():
        assert sum(field.size for field in struct.fields) == struct.size


@given(st.text(max_size=300))
def test_garbage_never_does_anything_but_fail(text):
    with pytest.raises(OurFault):
        parse(text)


def test_every_struct_of_the_real_layout_has_a_python_class():
    assert set(LAYOUT.classes) == set(LAYOUT.structs)
