"""What happens to files: bytes replaced, inserted, lost, or everything from somewhere on."""

from hypothesis import strategies as st

LIES = [b'\xff' * 4, b'\xff' * 8, b'\x7f' + b'\xff' * 7, b'\0' * 8]  # sizes that headers tell


@st.composite
def damaged(draw, content: bytes, start: int = 0) -> bytes:
    """`content` after one to three accidents, the bytes before `start` left as they are."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(start, max(start, len(changed))))
        lost = draw(st.sampled_from([0, 1, 4, 8, len(changed)]))
        changed[at : at + lost] = draw(st.sampled_from(LIES) | st.binary(max_size=8))
    return bytes(changed)
