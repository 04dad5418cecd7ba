"""What a run on OpenRLHF will take, predicted before anything starts: where each process is, and the memory of GPUs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from turnwise.agents.transformers_engine import PREFIX_TOKENS
from turnwise.environments.errors import InputError
from turnwise.protocols.graph import GraphProtocol
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.openrlhf.model_shape import ModelShape
from turnwise.rl.openrlhf.placement import Machine, Process, Role, place
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy

Bytes = Mapping[str, int]
"""Sizes by what they are the size of."""

CUDA = 1_000_000_000
"""What a process holds beside its tensors: the CUDA context, the workspaces of cuBLAS, the buffers of NCCL."""
GRAPHS = 1_000_000_000
"""What vLLM holds for its CUDA graphs; they stay while it sleeps."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer for gradients that are being summed: `reduce_bucket_size`, by default."""
LIVE = 1_050_000_000
"""Numbers that ZeRO-3 holds gathered: `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`, by default."""
BATCHED = 8192
"""Tokens that vLLM computes at once, at the most: the largest of its defaults for a server."""
RECOMPUTED = 1.6
"""How often what a layer keeps must be there, gradients counted in, where it is computed anew: as measured."""

ADAPTERS = (
    "one adapter per seat on a shared base: not supported, each policy has its full weights. OpenRLHF 0.11.2 can train "
    "LoRA (--ds.lora.rank), but Actor.__init__ gives each process a base of its own and one adapter "
    "(get_peft_model), ActorPPOTrainer.broadcast_to_vllm sends model.named_parameters() unmerged, under names "
    "(base_model.model.…lora_A.default.weight) that vLLM's load_weights refuses, and create_vllm_engines sets no "
    "enable_lora"
)
ASSUMED = (
    f"memory: GB are 10^9 bytes; {CUDA / 1e9:g} GB a process for CUDA and NCCL, {GRAPHS / 1e9:g} GB more for vLLM's "
    "CUDA graphs",
    f"DeepSpeed's buffer for gradients holds {BUCKET:.0e} numbers, ZeRO-3 gathers {LIVE:.2e} at the most",
    "logits are of whole sequences, in single precision (OpenRLHF's Actor.forward), and kept through the backward "
    "pass; their gradient takes 3 times that, with flash_attention_2 (which brings a fused cross entropy) up to 1.5",
    "a micro-batch holds sequences of the longest dialogue that the protocol allows, prompt included",
    f"vLLM computes {BATCHED} tokens at once, at the most",
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process has on its GPU while the ranks learn and while the engines sample, and then in main memory."""

    learning: Bytes
    sampling: Bytes
    main_memory: int = 0


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU, its processes, and what is on it in each phase, by part."""

    node: int
    number: int
    processes: tuple[Process, ...]
    learning: Bytes
    sampling: Bytes

    @property
    def phase(self) -> Literal["learning", "sampling"]:
        """That in which it holds more."""
        return "learning" if sum(self.learning.values()) >= sum(self.sampling.values()) else "sampling"

    @property
    def peak(self) -> int:
        """The bytes of that phase."""
        return sum(self.parts.values())

    @property
    def parts(self) -> Bytes:
        """What makes up the peak, by part."""
        return self.learning if self.phase == "learning" else self.sampling


@dataclass(frozen=True, slots=True)
class Dialogues:
    """How long the dialogues of a policy can get, and how many of the longest have room in its engines' caches.

    `longest` counts the prompt and all that can be sampled, as far as the model's context goes. `at_once` is also
    bounded by how many turns the engines sample at once.
    """

    longest: int
    tokens_a_gigabyte: int
    cache_tokens: int
    at_once: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All processes, all GPUs that they use, and each policy's model and dialogues."""

    machine: Machine
    processes: tuple[Process, ...]
    gpus: tuple[GPU, ...]
    shapes: Mapping[str, ModelShape]
    dialogues: Mapping[str, Dialogues]
    main_memory: Mapping[int, int]
    """Bytes on each node that are moved there from its GPUs, at the most."""
    notes: tuple[str, ...]


def plan(
    policies: Mapping[str, Policy],
    settings: OpenRLHFSettings,
    protocol: GraphProtocol,
    machine: Machine,
    *,
    prompt_tokens: int = 512,
) -> Plan:
    """What training `policies` takes. `prompt_tokens` is the length of the longest prompt, instructions and all.

    Seats that no policy fills are said to be left out. Raises InputError, of one line, for models that are not there,
    for seats that the protocol has not, and for what does not fit the machine.
    """
    filled = [seat for policy in policies.values() for seat in policy.seats]
    if strange := [seat for seat in filled if seat not in protocol.seats or filled.count(seat) > 1]:
        raise InputError(
            f"policies fill seats of this protocol, of {list(protocol.seats)}, each once; got {strange}: name others"
        )
    partners = [seat for seat in protocol.seats if seat not in filled]
    left_out = (f"left out: who fills the seat(s) {partners}, which no policy does",) if partners else ()
    shapes = {name: ModelShape.of(policy.model) for name, policy in policies.items()}
    dialogues = {
        name: _dialogues(name, shape, settings, prompt_tokens + protocol.graph.worst_case()[1])
        for name, shape in shapes.items()
    }
    has_reference = {name: policy.learner.loss.kl_coefficient > 0 for name, policy in policies.items()}
    processes = place(has_reference, settings, machine)
    prints = {
        (name, role): footprint(role, shapes[name], settings, policies[name].learner, dialogues[name].longest)
        for name, role in {(process.policy, process.role) for process in processes}
    }
    gpus, moved = list[GPU](), Counter[int]()
    for place_ in sorted({(one.node, one.gpu) for one in processes if one.gpu is not None}):
        here = tuple(one for one in processes if (one.node, one.gpu) == place_)
        learning, sampling = Counter[str](), Counter[str]()
        for one in here:
            learning.update(prints[one.policy, one.role].learning)
            sampling.update(prints[one.policy, one.role].sampling)
            moved[one.node] += prints[one.policy, one.role].main_memory
        gpus.append(GPU(*place_, here, learning, sampling))
    for gpu in gpus:
        _check(gpu, machine, settings)
    return Plan(machine, tuple(processes), tuple(gpus), shapes, dialogues, moved, (*left_out, ADAPTERS, *ASSUMED))


def footprint(
    role: Role, shape: ModelShape, settings: OpenRLHFSettings, learner: LearnerSettings, longest: int
) -> Footprint:
    """The memory of one process."""
    if role == "engine":
        return _engine(shape, settings, longest)
    return _rank(shape, settings, learner, longest) if role == "rank" else _reference(shape, settings)


def _rank(shape: ModelShape, settings: OpenRLHFSettings, learner: LearnerSettings, longest: int) -> Footprint:
    """ZeRO (arXiv 1910.02054, §5) divides 12 bytes a parameter of the optimiser's (its weights and Adam's two moments,
    in single precision), from stage 2 on the gradients, and in stage 3 the weights, by the number of ranks.
    """
    width, ranks, stage = _width(settings), settings.ranks, settings.zero_stage
    part = -(-shape.parameters // ranks)
    weights = width * (part if stage == 3 else shape.parameters)
    gathered = width * min(LIVE, shape.parameters) if stage == 3 and ranks > 1 else 0
    optimiser = 12 * part
    # Added up in single precision from stage 2 on; there those of the micro-batch at hand stand beside them.
    gradients = {1: width * shape.parameters, 2: (4 + width) * part, 3: 4 * part}[stage]
    buffers = width * BUCKET
    if stage == 2 and ranks > 1:
        buffers += width * shape.vocabulary * shape.hidden  # the largest gradient, which no bucket holds
    tokens = learner.micro_batch_size * longest
    kept = shape.kept(
        tokens, longest, width=width, attention=settings.attention, checkpointing=settings.gradient_checkpointing
    )
    logits = 4 * tokens * shape.vocabulary
    fused = settings.attention == "flash_attention_2"
    # The gradient of the logits, and its half-precision copy; or a new one for each of three steps on the way back.
    back = tokens * shape.vocabulary * ((4 + (width if width < 4 else 0)) if fused else 12)
    if learner.loss.entropy_coefficient:
        logits, back = 4 * logits, back + 3 * logits
    if settings.gradient_checkpointing:
        layer = shape.kept_by_layer(tokens, longest, width=width, attention=settings.attention)
        back = max(back, int(RECOMPUTED * layer))
    # The optimiser's step comes after the backward pass: the gradient flattened, and in single precision.
    step = 4 * min(part, LIVE) if stage == 3 else (4 + (width if stage == 1 and width < 4 else 0)) * part
    learning = {
        "weights": weights,
        "gathered weights": gathered,
        "gradients": gradients,
        "optimiser": optimiser,
        "activations": kept,
        "logits": logits + back,
        "buffers": buffers,
        "optimiser step": max(0, step - kept - logits - back - buffers),
        "CUDA": CUDA,
    }
    if settings.colocated:
        return Footprint(learning, {"weights": weights, "CUDA": CUDA}, optimiser + (gradients if stage == 3 else 0))
    held = {"gradients": gradients, "buffers": buffers} if stage == 3 else {}
    return Footprint(learning, {"weights": weights, "optimiser": optimiser, **held, "CUDA": CUDA})


def _reference(shape: ModelShape, settings: OpenRLHFSettings) -> Footprint:
    """No optimiser, no gradients; what its forward pass takes is given back before the ranks learn, who take more."""
    width, divided = _width(settings), settings.zero_stage == 3
    held = {
        "reference weights": width * -(-shape.parameters // (settings.ranks if divided else 1)),
        "gathered weights": width * min(LIVE, shape.parameters) if divided and settings.ranks > 1 else 0,
        "CUDA": CUDA,
    }
    return Footprint(held, held)


def _engine(shape: ModelShape, settings: OpenRLHFSettings, longest: int) -> Footprint:
    width = _width(settings)
    weights, cache = width * shape.parameters, int(settings.cache_gigabytes * 1e9)
    if settings.engine == "transformers":
        awake = {
            "engine weights": weights,
            "cache": (settings.max_running * longest + PREFIX_TOKENS) * shape.cached(width=width),
            "CUDA": CUDA,
        }
        return Footprint(awake, awake)
    computed = BATCHED * 2 * (shape.hidden + shape.intermediate) * width
    chosen = 3 * 4 * settings.max_running * shape.vocabulary  # logits, log-probabilities, and both sorted or drawn from
    awake = {
        "engine weights": weights,
        "cache": cache,
        "workspace": computed + chosen + width * shape.vocabulary * shape.hidden,  # the largest weight on its way in
        "CUDA": CUDA + GRAPHS,
    }
    if settings.colocated:
        return Footprint({"CUDA": CUDA + GRAPHS}, awake, weights)
    return Footprint(awake, awake)


def _dialogues(policy: str, shape: ModelShape, settings: OpenRLHFSettings, most: int) -> Dialogues:
    """Raises InputError for a context that the model has not, or that the cache has no room for."""
    context = settings.context or shape.context
    if context > shape.context:
        raise InputError(
            f"context must be within the model's; {policy!r} asks for {context} tokens and its model has "
            f"{shape.context}: leave it out, or lower it"
        )
    token = shape.cached(width=_width(settings))
    cache = int(settings.cache_gigabytes * 1e9 / token)
    if settings.engine == "vllm" and cache < context:
        raise InputError(
            f"vLLM wants room for one dialogue of the whole context; that of {policy!r} has {context} tokens, "
            f"{context * token / 1e9:.2f} GB, and cache_gigabytes is {settings.cache_gigabytes:g}: raise it, or set "
            "context to what the protocol needs"
        )
    longest = min(most, context)
    if settings.engine == "transformers":
        cache = settings.max_running * longest
    at_once = min(cache // longest, settings.max_running) * settings.actors
    return Dialogues(longest, int(1e9 / token), cache * settings.actors, at_once)


def _remedies(settings: OpenRLHFSettings) -> dict[str, str]:
    """What makes each part smaller and is not asked for already."""
    shorter = "a smaller micro_batch_size or context"
    return {
        "weights": "more ranks" if settings.zero_stage == 3 else "zero_stage = 3",
        "gathered weights": "fewer processes a GPU",
        "gradients": "zero_stage = 2 or 3" if settings.zero_stage == 1 else "more ranks",
        "optimiser": "more ranks",
        "activations": shorter if settings.gradient_checkpointing else f"gradient_checkpointing, or {shorter}",
        "logits": shorter if settings.attention == "flash_attention_2" else f"flash_attention_2, or {shorter}",
        "cache": "a smaller cache_gigabytes" if settings.engine == "vllm" else "a smaller max_running or context",
        "workspace": "a smaller max_running",
    }


def _check(gpu: GPU, machine: Machine, settings: OpenRLHFSettings) -> None:
    usable = machine.usable * machine.gpu_gigabytes * 1e9
    if gpu.peak <= usable:
        return
    parts = sorted(gpu.parts.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts[:3])
    known = _remedies(settings)
    remedies = [known[name] for name, _ in parts[:3] if name in known] or ["fewer processes a GPU"]
    raise InputError(
        f"a plan must fit each GPU's memory; GPU {gpu.number} of node {gpu.node} needs {gpu.peak / 1e9:.1f} GB while "
        f"{gpu.phase} ({named}), and {usable / 1e9:.1f} of {machine.gpu_gigabytes:g} GB can be planned with: ask for "
        f"{'; or '.join(dict.fromkeys(remedies))}"
    )


def _width(settings: OpenRLHFSettings) -> int:
    """Bytes of a number in the forward and backward pass."""
    return 4 if settings.precision == "fp32" else 2
