"""An engine without a model: it says what it is told to, in the tokens of a real tokenizer."""

from turnwise.agents.engine import Engine, PartialReply, Request
from turnwise.environments.transcript import Reply


class ScriptedEngine(Engine):
    """Says `line` to every prompt, token by token, and then ends the sequence.

    Stops, end-of-sequence tokens, budget and context end a reply as in any other engine. All log-probabilities are 0.
    """

    line = ""
    version = 0

    async def serve(self, request: Request) -> Reply:
        """The line, up to where it ends."""
        said = PartialReply(matcher=self._matcher(request.stops), ends=self.ends, budget=request.max_tokens)
        for token in (*self.template.tokens(self.line), self.tokenizer.eos_token_id):
            said.take(token, 0.0)
            if said.finish is not None:
                break
        return self._reply(request.prompt, said, self.version)
