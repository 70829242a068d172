"""Text <-> token ids: tokenizers, chat templates, incremental detokenizing, in this one place."""

from pentad.text.detokenizer import Detokenizer
from pentad.text.tokenizer import Source, Tokenizer, refusing

__all__ = ["Detokenizer", "Source", "Tokenizer", "load"]


def load(checkpoint: Source) -> Tokenizer | None:
    """The tokenizer that lies in or beside a checkpoint; None where it has none.

    Raises `BadInput` where the files are there but broken, or of a kind that pentad can't read.
    """
    from pentad.text import gguf_vocab, hf_vocab

    with refusing(f"{checkpoint.path}: its tokenizer can't be read"):
        if checkpoint.format == "gguf":
            return gguf_vocab.load(checkpoint.config)
        return hf_vocab.load(checkpoint.path)
