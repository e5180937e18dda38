"""How generated answers are written: whole, with details of their tokens, and piece by piece."""

from __future__ import annotations

from typing import Any, cast

from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Request


class Told:
    """What has been streamed so far, as Text Generation Inference tells it."""

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._text: list[str] = []
        self._last_token = 0
        self._events = self._tokens = self._prompt_tokens = 0

    def event(self, piece: GeneratedPiece) -> dict[str, Any]:
        """The last one has the whole text. A log probability is null where the way of generating has none: beams."""
        self._text.append(piece.text)
        self._events += 1
        self._prompt_tokens = max(self._prompt_tokens, piece.prompt_tokens)
        if piece.token is not None:
            self._last_token, self._tokens = piece.token, self._tokens + 1
        logprob = piece.logprob
        untold = 0.0 if piece.token is None else None
        token = {
            "id": self._last_token,
            "text": piece.text,
            "logprob": untold if logprob is None else logprob.logprob,
            "special": piece.special,
        }
        event: dict[str, Any] = {"index": self._events, "token": token, "generated_text": None, "details": None}
        if logprob is not None and logprob.top:
            event["top_tokens"] = [_token(top) for top in logprob.top]
        if piece.finish_reason is not None:
            event["generated_text"] = "".join(self._text)
            event["details"] = {
                "finish_reason": _reason(piece.finish_reason, self._options, piece.special),
                "generated_tokens": self._tokens,
                "input_length": self._prompt_tokens,
                "seed": self._options.seed,
            }
        return event


def details_of(generated: Generated, request: Request) -> dict[str, Any]:
    """What Text Generation Inference tells of a whole answer's tokens."""
    options = cast(GenerationOptions, request.options)
    ended = generated.finish_reason == "stop" and not options.stop
    tokens = [_token(each) for each in generated.logprobs]
    if ended and tokens:
        tokens[-1]["special"] = True
    details: dict[str, Any] = {
        "finish_reason": _reason(generated.finish_reason, options, special=ended),
        "generated_tokens": len(generated.tokens),
        "seed": options.seed,
        "prefill": [],
        "tokens": tokens,
    }
    if options.logprobs:
        details["top_tokens"] = [[_token(top) for top in each.top] for each in generated.logprobs]
    return details


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"id": token.token, "text": token.text, "logprob": token.logprob, "special": False}


def _reason(reason: str, options: GenerationOptions, special: bool) -> str:
    """Text Generation Inference tells an end token from a stop text."""
    if reason == "length":
        return "length"
    return "stop_sequence" if options.stop and not special else "eos_token"
