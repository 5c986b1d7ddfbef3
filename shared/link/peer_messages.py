"""Pure. The messages by which workers give each other the files of adapters. The rules of
messages.py for changes hold here, too.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from shared.adapters.identity import AdapterRef


class PieceRequest(msgspec.Struct, frozen=True, tag="piece_request", array_like=True):
    """Asks for bytes of one part of one file of an adapter. Each request gets one answer with its
    `number`.
    """

    number: int
    adapter: AdapterRef
    path: str
    offset: int
    size_bytes: int


class Piece(msgspec.Struct, frozen=True, tag="piece", array_like=True):
    """The bytes, and the SHA-256 (hex) of the whole part that they lie in, computed when the part
    came from the store.
    """

    number: int
    sha256: str
    data: bytes


class PieceNotYet(msgspec.Struct, frozen=True, tag="piece_not_yet", array_like=True):
    """This host is downloading the part, and its download last got bytes `idle_s` seconds ago. Ask
    again.
    """

    number: int
    idle_s: float = 0.0


class PieceNotHere(msgspec.Struct, frozen=True, tag="piece_not_here", array_like=True):
    """This host does not have the part and will not have it soon, or it serves too many
    others now.
    """

    number: int


PeerQuestion: TypeAlias = PieceRequest
PeerAnswer: TypeAlias = Piece | PieceNotYet | PieceNotHere

decode_peer_question = msgspec.msgpack.Decoder(PeerQuestion).decode
decode_peer_answer = msgspec.msgpack.Decoder(PeerAnswer).decode
