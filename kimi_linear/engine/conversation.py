"""A chat that goes on: the model's state stays between the turns, so that each turn reads only what is new."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_linear.data.chat import ChatFormat, Parts, joined, remainder
from kimi_linear.data.tokenizers import Tokenizer
from kimi_linear.data.tool_calls import Delta, TextDelta, ToolCallParser, assistant_message
from kimi_linear.engine.config import SamplingConfig
from kimi_linear.engine.generate import GenerationStats, check_tokenizer, draw
from kimi_linear.engine.stop import StopMatcher
from kimi_linear.model import KimiLinear, ModelState

DEFAULT_SAMPLING = SamplingConfig(max_tokens=512)


class Conversation:
    """Messages, and the state of the model that has read them.

    The state is continued as long as the chat, rendered anew, begins with exactly what the model has read. Where it does not
    (a stop string cut the answer, or a template rewrites earlier turns), the whole chat is read again;
    ``stats.reused_tokens`` of the answer shows it.

    Attributes:
        messages: the chat so far, answers included, in the form of OpenAI's API.
        format: how messages become ids.
    """

    def __init__(
        self,
        model: KimiLinear,
        tokenizer: Tokenizer,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin with ``messages``, such as a system prompt; nothing is read yet.

        Args:
            model: on its own device.
            tokenizer: the one that the model was trained with.
            messages: what was said before.
            tools: declarations of what the model may call.
            template: instead of the folder's chat template.
            variables: more values that the template reads.

        Raises:
            ValueError: a tokenizer with more ids than the model; no chat template and no role tokens.
        """
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.format = model, tokenizer, ChatFormat(tokenizer, template)
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._tools, self._variables = tools, variables
        self._answer: Answer | None = None
        self._forget()

    def send(
        self,
        message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> Answer:
        """Say something and get the answer, which is written while it is iterated over.

        An answer that is still being written ends where it is. Its message joins ``messages`` at its end. An error, or
        Ctrl-C, before the answer's first token takes back what was sent.

        Args:
            message: what the user says, or a message, or several, such as the results of tool calls.
            sampling: how to draw.

        Raises:
            ValueError, TypeError: messages that the chat format cannot say.
        """
        if self._answer is not None:
            self._answer.close()
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        new = [dict(message)] if isinstance(message, Mapping) else [dict(one) for one in message]
        parts = self.format.render([*self.messages, *new], tools=self._tools, variables=self._variables)
        rest = None if self._state is None else remainder(parts, self._said)
        if rest is None:
            self._forget()
            rest = parts
        ids = [*self._unread, *self.tokenizer.encode_parts(rest)]
        state = self.model.make_state(1) if self._state is None else self._state
        # From here on the state is the answer's; it comes back when that has ended well.
        self._forget()
        self.messages += new
        self._answer = Answer(self, ids, parts, len(new), sampling, state)
        return self._answer

    def _forget(self) -> None:
        self._state: ModelState | None = None
        self._said: Parts = ()  # the chat as far as the state has read it, and the unread ids after that
        self._unread: list[int] = []

    def _take_back(self, count: int) -> None:
        del self.messages[len(self.messages) - count :]

    def _keep(self, message: dict[str, Any], state: ModelState | None, said: Parts, unread: list[int]) -> None:
        self.messages.append(message)
        self._state, self._said, self._unread = state, said, unread


class Answer(Iterator[Delta]):
    """One answer as it is written: text and tool calls. ``Conversation.send`` makes it.

    Attributes:
        stats: how it went; complete at the end.
    """

    def __init__(
        self,
        conversation: Conversation,
        ids: list[int],
        parts: Parts,
        sent: int,
        sampling: SamplingConfig,
        state: ModelState,
    ) -> None:
        self.stats = GenerationStats(prompt_tokens=len(ids), reused_tokens=state.position)
        self._chat, self._ids, self._parts, self._sent, self._state = conversation, ids, parts, sent, state
        self._first = state.position
        self._parser, self._matcher = ToolCallParser(conversation.tokenizer), StopMatcher(sampling.stop)
        self._tokens = draw(conversation.model, conversation.tokenizer, ids, sampling, self.stats, state)
        self._drawn: list[int] = []
        self._shown: list[str] = []
        self._ready: deque[Delta] = deque()
        self._over = False

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Delta:
        while not self._ready:
            if self._over:
                raise StopIteration
            self._step()
        return self._ready.popleft()

    def text(self) -> str:
        """The text of what is left of the answer."""
        return "".join([delta.text for delta in self if isinstance(delta, TextDelta)])

    def close(self) -> None:
        """Stop here; what was written so far is the answer."""
        if not self._over:
            self._finish()
        self._ready.clear()

    def _step(self) -> None:
        try:
            token = next(self._tokens, None)
        except BaseException:
            # Ctrl-C too: some layers may have read a token that others have not, so the state is given up.
            self._over = True
            if self._drawn:
                self._flush()
                self._chat._keep(self._message(), None, (), [])
            else:
                self._chat._take_back(self._sent)
            raise
        if token is None:
            self._finish()
            return
        self._drawn.append(token)
        self._say(self._parser.push(token))
        if self._matcher.stopped:
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._flush()
        if self._matcher.stopped:
            self.stats.finish_reason = "stop"
        read = self._state.position - self._first
        said = joined([*self._parts, *self._chat.format.parts_of(self._drawn)])
        self._chat._keep(self._message(), self._state, said, [*self._ids, *self._drawn][read:])

    def _flush(self) -> None:
        """Nothing more comes: what the parser and the matcher held back is said."""
        if not self._matcher.stopped:
            self._say(self._parser.finish())
        if not self._matcher.stopped:
            self._say_text(self._matcher.finish())

    def _say(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if self._matcher.stopped:
                return
            if isinstance(delta, TextDelta):
                self._say_text(self._matcher.push(delta.text))
            else:
                self._say_text(self._matcher.finish())  # a stop string does not reach over a call
                self._ready.append(delta)

    def _say_text(self, text: str) -> None:
        if text:
            self._shown.append(text)
            self._ready.append(TextDelta(text=text))

    def _message(self) -> dict[str, Any]:
        return assistant_message("".join(self._shown), self._parser.calls)
