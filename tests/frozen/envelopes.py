#!/usr/bin/env python3
"""Prints the frozen envelopes of src/mongo/codec/encrypted/tests.rs.

It does not use the crate: HChaCha20 is written here after the draft, and the rest is OpenSSL's
ChaCha20-Poly1305 (pip install cryptography).
https://datatracker.ietf.org/doc/html/draft-irtf-cfrg-xchacha-03
"""

from struct import pack, unpack

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305


def hchacha20(key, nonce):
    state = [*unpack("<4I", b"expand 32-byte k"), *unpack("<8I", key), *unpack("<4I", nonce)]

    def add_and_turn(a, b, d, bits):
        state[a] = (state[a] + state[b]) & 0xFFFFFFFF
        mixed = state[d] ^ state[a]
        state[d] = (mixed << bits | mixed >> (32 - bits)) & 0xFFFFFFFF

    def quarter(a, b, c, d):
        add_and_turn(a, b, d, 16)
        add_and_turn(c, d, b, 12)
        add_and_turn(a, b, d, 8)
        add_and_turn(c, d, b, 7)

    for _ in range(10):
        for column in range(4):
            quarter(column, 4 + column, 8 + column, 12 + column)
        for column in range(4):
            quarter(column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return pack("<8I", *state[:4], *state[12:])


def seal(key, nonce, text, bound):
    derived = hchacha20(key, nonce[:16])
    return ChaCha20Poly1305(derived).encrypt(bytes(4) + nonce[16:], text, bound)


def envelope(key_id, key, nonce, document_id, text):
    header = b"\x01" + pack(">I", key_id) + nonce
    return header + seal(key, nonce, text, header + document_id)


# The draft's own vectors, A.3.1 and 2.2.1.
assert hchacha20(
    bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927")
).hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
TEXT = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
sealed = seal(
    bytes(range(0x80, 0xA0)), bytes(range(0x40, 0x58)), TEXT, bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
)
assert sealed[:8].hex() == "bd6d179d3e83d43b", sealed.hex()
assert sealed[-16:].hex() == "c0875924c1c7987947deafd8780acf49", sealed.hex()

KEY = bytes(range(32))
for key_id, nonce, document_id, text in [
    (1, bytes(24), bytes(32), "{}"),
    (2026, bytes(range(100, 124)), bytes(range(200, 232)), '{"user":"Zoë","views":3}'),
    (2**32 - 1, b"\xff" * 24, b"\xff" * 32, '{"long":"' + "x" * 70 + '"}'),
]:
    print(key_id, nonce.hex(), document_id.hex(), text)
    print(envelope(key_id, KEY, nonce, document_id, text.encode()).hex())
