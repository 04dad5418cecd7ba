import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from turnwise.agents.chat import ChatTemplate, fingerprint
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Reply, Turn

QUESTION = Message("user", "what is 2 plus 3?")


def turn(*messages: Message, prefill: str = "") -> Turn:
    return Turn("seat", "state", messages, ("</think>",), 8, prefill)


def said(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...], vocabulary: str | None = None) -> Message:
    text = tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id])
    vocabulary = vocabulary or fingerprint(tokenizer)
    return Message("assistant", text, Reply(text, len(ids), token_ids=ids, tokenizer=vocabulary))


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def text_of(template: ChatTemplate, asked: Turn) -> str:
    return template.tokenizer.decode(template.prompt(asked))


def test_header_and_prefill(template: ChatTemplate) -> None:
    asked = turn(Message("system", "so it is."), QUESTION, prefill="<think>")
    assert text_of(template, asked) == (
        "<|im_start|>system\nso it is.<|im_end|>\n<|im_start|>user\nwhat is 2 plus 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>"
    )


def test_neighbouring_assistant_messages_are_one(template: ChatTemplate) -> None:
    asked = turn(QUESTION, Message("assistant", "the answer"), Message("assistant", " is 5"), prefill=".")
    assert text_of(template, asked).endswith("<|im_start|>assistant\nthe answer is 5.")


def test_user_message_after_assistant_closes_it(template: ChatTemplate) -> None:
    asked = turn(QUESTION, Message("assistant", "it is 5"), Message("user", "so?"), Message("system", "then"))
    assert text_of(template, asked).endswith(
        "assistant\nit is 5<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>system\nthen<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_end_of_sequence_is_not_doubled(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = said(tokenizer, (40, 41, tokenizer.eos_token_id))
    ids = template.prompt(turn(QUESTION, spoken, Message("user", "so?")))
    header = template.prompt(turn(QUESTION))
    assert ids[: len(header) + 3] == [*header, 40, 41, tokenizer.eos_token_id]
    assert tokenizer.decode(ids[len(header) + 3 :]) == "\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"


def test_sampled_ids_are_appended_exactly(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
    # Spelled letter by letter, as no tokenizer would.
    ids = tuple(tokenizer(letter)["input_ids"][0] for letter in "theanswer")
    header = template.prompt(turn(QUESTION))
    assert template.prompt(turn(QUESTION, said(tokenizer, ids)))[len(header) :] == list(ids)


def test_other_vocabulary_is_read_as_text(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tuple(tokenizer(letter)["input_ids"][0] for letter in "theanswer")
    header = template.prompt(turn(QUESTION))
    heard = template.prompt(turn(QUESTION, said(tokenizer, ids, vocabulary="another")))[len(header) :]
    assert heard == tokenizer("theanswer")["input_ids"] != list(ids)


def test_text_that_was_cut_hides_the_rest_of_the_reply(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = said(tokenizer, tuple(tokenizer("it is 5. so it is.")["input_ids"]))
    shown = Message("assistant", "it is 5.", whole.reply)
    assert text_of(template, turn(QUESTION, shown)).endswith("assistant\nit is 5.")


def test_fingerprint_knows_added_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    assert fingerprint(other) == fingerprint(tokenizer)
    other.add_tokens(["<rethink>"])
    assert fingerprint(other) != fingerprint(tokenizer)


TEXT = st.sampled_from(["", " ", "so", "the answer is 5.", "<think>", "</think>", "é\n", "<|im_end|>", "plus plus"])
PARTNER = st.builds(Message, st.just("assistant"), TEXT)
HEARD = st.builds(Message, st.sampled_from(["user", "system"]), TEXT)


@given(data=st.data())
@settings(max_examples=60)
def test_a_later_prompt_begins_with_the_earlier_prompt_and_reply(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    messages = [data.draw(HEARD) for _ in range(data.draw(st.integers(1, 3)))]
    known: list[int] = []
    for _ in range(4):
        prefill = data.draw(TEXT)
        prompt = template.prompt(turn(*messages, prefill=prefill))
        assert prompt[: len(known)] == known
        ids = tuple(data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=5)))
        known = [*prompt, *ids]
        messages += [Message("assistant", prefill), said(tokenizer, ids)]
        messages += data.draw(st.lists(PARTNER | HEARD, max_size=3))


IM = "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
FORCED = "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"


@pytest.mark.parametrize(
    "source",
    [
        IM + FORCED,
        IM + "{% if add_generation_prompt %}[assistant]Let me see: {% endif %}",
        "{% for message in messages %}{{ message.content }} <answer>{% endfor %}"
        "{% if add_generation_prompt %} <short> {% endif %}",
    ],
)
def test_forced_mode_is_refused(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    with pytest.raises(InputError, match="must leave the reply to the model; this one begins every reply with"):
        ChatTemplate(with_template(tokenizer, source))


@pytest.mark.parametrize(
    "source",
    [
        IM + "{% if add_generation_prompt %}[assistant]{% endif %}",
        "{% for message in messages %}{{ message.content }} {% endfor %}",
        # Qwen3's: an empty thought in the last answer of a history, none in the generation prompt.
        "{% for message in messages %}[{{ message.role }}]"
        "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_open_templates_are_accepted(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    template = ChatTemplate(with_template(tokenizer, source))
    asked = turn(QUESTION, Message("assistant", "<think>5</think>"), Message("user", "so?"))
    assert "<think>5</think>" in text_of(template, asked)


def test_tokenizer_without_template_or_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no chat template: set"):
        ChatTemplate(with_template(tokenizer, None))
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token: set"):
        ChatTemplate(endless)


def test_unstable_template_is_refused_only_where_it_matters(tokenizer: PreTrainedTokenizerFast) -> None:
    forgets = "{% for message in messages[-1:] %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    template = ChatTemplate(with_template(tokenizer, forgets))
    spoken = Message("assistant", "it is 5")
    assert text_of(template, turn(QUESTION, spoken)) == "[user]what is 2 plus 3?it is 5"
    with pytest.raises(InputError, match="drops or changes earlier messages: give"):
        template.prompt(turn(QUESTION, spoken, QUESTION))


def test_refused_roles_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    template = ChatTemplate(with_template(tokenizer, strict))
    with pytest.raises(InputError, match=r"refuses messages with the roles \['system', 'user'\] \(no system\)"):
        template.prompt(turn(Message("system", "be brief"), QUESTION))


def test_a_turn_begins_with_a_question(template: ChatTemplate) -> None:
    for messages in ((), (Message("assistant", "it is 5"),)):
        with pytest.raises(InputError, match="must begin with a system or user message"):
            template.prompt(turn(*messages))
