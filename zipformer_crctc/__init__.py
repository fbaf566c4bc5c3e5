"""Speech in any language to IPA phones: Zipformer encoder, CTC and consistency-regularised CTC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipformer_crctc.transcriber import PhoneRecognizer, Transcription

__all__ = ["PhoneRecognizer", "Transcription"]


def __getattr__(name: str) -> Any:
    # Imported on first use: training and the model alone need neither audio nor a tokenizer.
    if name in __all__:
        from zipformer_crctc import transcriber

        return getattr(transcriber, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
