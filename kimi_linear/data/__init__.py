"""What a model reads: tokenizers, corpora, batches and synthetic tasks."""

from kimi_linear.data.tokenizers import ByteTokenizer, HFTokenizer, StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "HFTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]
