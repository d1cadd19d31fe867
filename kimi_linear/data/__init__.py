"""What a model reads: tokenizers, corpora, batches and synthetic tasks."""

from kimi_linear.data.batch import IGNORE, Batch
from kimi_linear.data.chat import ChatFormat
from kimi_linear.data.corpus import Corpus, Documents, read_documents, stdlib_source, tokenize
from kimi_linear.data.packing import BatchStream, CorpusStream, Packing, TaskStream, in_order
from kimi_linear.data.synthetic import MQAR, Palindrome, Stack, Task
from kimi_linear.data.text_stream import StreamDecoder
from kimi_linear.data.tiktoken import TiktokenTokenizer
from kimi_linear.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from kimi_linear.data.tool_calls import TextDelta, ToolCall, ToolCallDelta, ToolCallParser, parse_tool_calls

__all__ = [
    "IGNORE",
    "MQAR",
    "Batch",
    "BatchStream",
    "ByteTokenizer",
    "ChatFormat",
    "Corpus",
    "CorpusStream",
    "Documents",
    "HFTokenizer",
    "Packing",
    "Palindrome",
    "Stack",
    "StreamDecoder",
    "Task",
    "TaskStream",
    "TextDelta",
    "TiktokenTokenizer",
    "Tokenizer",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallParser",
    "in_order",
    "load_tokenizer",
    "parse_tool_calls",
    "read_documents",
    "stdlib_source",
    "tokenize",
]
