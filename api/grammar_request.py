"""Which grammar a request's output must follow, from its answer format and its tools."""

import json
from collections.abc import Sequence
from functools import partial

from api.chat import RenderedPrompt, Tool
from api.encoding import markers
from api.grammar import Constraint, GrammarChecker, encode_constraint
from api.grammar_calls import calls_grammar
from api.grammar_formats import Format, check_schema_size
from api.parse_events import StartState
from api.tokenizer import Tokenizer
from runtime.errors import RequestError


class GrammarPlanner:
    """Chooses, builds and checks the constraint of each request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._checker = GrammarChecker(tokenizer)
        self._dsml_id = tokenizer.id_of(markers.DSML)

    async def for_text(self, answer: Format, param: str) -> bytes:
        """The constraint of a completion. Raises RequestError, naming `param`, for a format that cannot be enforced."""
        return await self._checker.check(Constraint(grammar=_grammar(answer, None)), param)

    async def for_chat(
        self,
        rendered: RenderedPrompt,
        answer: Format | None,
        param: str,
        *,
        single_call: bool = False,
        thinking_budget: int | None = None,
    ) -> bytes | None:
        """The constraint of a chat, None when anything goes.

        A demanded call must be one of the tools offered and follow its schema. With an answer format the output is
        such an answer, or calls where tools are offered. Otherwise only calls are bound, and only if a tool is strict
        or `single_call` forbids several. `param` is the field that asks for the answer format. `thinking_budget` bounds
        the reasoning, where there is any.
        """
        if rendered.start.state is not StartState.REASONING:
            thinking_budget = None
        must_call = rendered.must_call
        single_call = single_call or rendered.one_call
        if must_call:
            answer = None
        only_calls = not must_call and answer is None
        if only_calls and not (rendered.tools and (single_call or any(tool.strict for tool in rendered.tools))):
            if thinking_budget is None:
                return None
            free = Constraint(after_reasoning=True, allows_calls=bool(rendered.tools), thinking_budget=thinking_budget)
            return encode_constraint(free)
        binding = [must_call or tool.strict for tool in rendered.tools]
        planned = partial(
            self._constraint, rendered, answer, only_calls=only_calls, single=single_call, budget=thinking_budget
        )
        constraint = planned(binding)
        if not any(binding):
            return await self._checker.check(constraint, param)
        if answer is not None:
            await self._checker.check(Constraint(grammar=_grammar(answer, None)), param)
        try:
            check_tool_sizes(rendered.tools, binding)
            return await self._checker.check(constraint, "tools")
        except RequestError:
            binding = await self._enforceable(rendered.tools, binding)
        return await self._checker.check(planned(binding), "tools")

    def close(self) -> None:
        self._checker.close()

    def _constraint(
        self,
        rendered: RenderedPrompt,
        answer: Format | None,
        binding: Sequence[bool],
        *,
        only_calls: bool,
        single: bool,
        budget: int | None,
    ) -> Constraint:
        calls = None
        if rendered.tools:
            opened = rendered.start.state is StartState.TOOL
            calls = calls_grammar(rendered.tools, self._dsml_id, opened=opened, single=single, by_schema=binding)
        return Constraint(
            grammar=_grammar(answer, calls),
            after_reasoning=rendered.start.state is StartState.REASONING,
            only_calls=only_calls,
            allows_calls=calls is not None,
            prefix=rendered.answer_prefix if answer is not None else "",
            thinking_budget=budget,
        )

    async def _enforceable(self, tools: Sequence[Tool], binding: Sequence[bool]) -> list[bool]:
        """Find the schemas that cannot be compiled. Strict ones are an error; of the others only the names bind."""
        found: list[bool] = []
        for index, (tool, binds) in enumerate(zip(tools, binding, strict=True)):
            if binds:
                param = f"tools.{index}.function.parameters"
                rules = calls_grammar((tool,), self._dsml_id, opened=False, single=True, by_schema=(True,))
                try:
                    check_schema_size(tool.parameters, param)
                    await self._checker.check(Constraint(grammar=_grammar(None, rules)), param)
                except RequestError:
                    if tool.strict:
                        raise
                    binds = False
            found.append(binds)
        return found


def check_tool_sizes(tools: Sequence[Tool], binding: Sequence[bool]) -> None:
    for tool, binds in zip(tools, binding, strict=True):
        if binds:
            check_schema_size(tool.parameters, "tools")


def _grammar(answer: Format | None, calls: str | None) -> str:
    """llguidance's JSON form: the first grammar is the whole output, `@answer` refers to the second."""
    if calls is None:
        return json.dumps({"grammars": [answer]}, ensure_ascii=False)
    if answer is None:
        return json.dumps({"grammars": [{"lark_grammar": f"start: calls\n{calls}"}]}, ensure_ascii=False)
    both = {"lark_grammar": f"start: @answer | calls\n{calls}"}
    return json.dumps({"grammars": [both, {**answer, "name": "answer"}]}, ensure_ascii=False)
