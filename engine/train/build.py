"""Build a rank's pipeline stage from the configuration, ready to train: this file alone joins all packages.

Cut (plan) -> specification of the stage -> chunks on the meta device (models) -> tensor-sharded (parallel) -> parameter
groups (optim) -> ZeRO engine with initial weights -> schedule. Tests and benchmarks build through the same functions.
"""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from engine.config.deepspeed import deepspeed_config
from engine.config.objectives import RowLengths, has_segments, held_lengths
from engine.config.parameter_patterns import matches
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.models.families import family
from engine.models.heads import Head
from engine.models.initial import initial_value
from engine.optim.groups import make_optimizer, parameter_groups
from engine.parallel.boundary import Boundary, MicroBatchShape
from engine.parallel.distillation import DistilledCrossEntropy, DistilledLabels, DistilledLosses
from engine.parallel.functions import PLAIN, Functions, SequenceSlice
from engine.parallel.groups import Groups, join
from engine.parallel.pipeline import Pipeline
from engine.parallel.recompute import recompute
from engine.parallel.sharding import ParameterSpec
from engine.parallel.stage import PipelineStageSpec, Ports, StageModule
from engine.parallel.tensor import shard, vocabulary_cross_entropy, whole_rows
from engine.parallel.ulysses import sequence_attention, whole_sequence
from engine.parallel.zero import StageEngine
from engine.parallel.zero.carry import Carried
from engine.plan.cut import ModelChunk, stage_chunks, tied_stages
from engine.plan.families import figures
from engine.plan.frozen import receives_gradients
from engine.plan.parts import of_each_head
from engine.plan.run_stages import cut_lengths, recomputed_layers


def join_groups(config: RunConfig, layout: Layout, global_rank: int) -> Groups:
    """Make the groups of a rank, those of the model's tied weights among them. Collective over the world."""
    parallel = config.parallel
    tied = tied_stages(*_cut(config, layout)).values()
    limit_seconds = config.launch.collective_limit_seconds
    return join(layout, global_rank, tied, parallel.chunks_per_stage, parallel.gather_within, limit_seconds)


def stage_spec(config: RunConfig, run_stage: RunStage, groups: Groups) -> PipelineStageSpec:
    """Specify this rank's pipeline stage for one run stage; its chunks are those of every run stage of the run."""
    model, kind = config.model, family(config.model)
    head, cut = kind.configured_head(model), _cut(config, groups.layout)
    chunks = stage_chunks(*cut)[groups.coordinates.stage]
    spec = PipelineStageSpec(
        run_stage=run_stage,
        rows=micro_batch_shape(config, run_stage),
        chunks=chunks,
        ports=tuple(Ports(kind.inputs(model, chunk, head), {}, {}) for chunk in chunks),
        parameters={spec.name: spec for spec in kind.specs(model, head)},
        aliases=kind.ties(model),
        tied_stages=tied_stages(*cut),
        losses=head.losses,
        modules=partial(_modules, model, head),
    )
    return during(spec, config, run_stage)


def during(spec: PipelineStageSpec, config: RunConfig, run_stage: RunStage) -> PipelineStageSpec:
    """Return the specification of the same pipeline stage for another run stage."""
    frozen = frozenset(name for name in spec.parameters if matches(name, run_stage.freeze))
    changed = replace(spec, run_stage=run_stage, frozen=frozen)
    return with_rows(changed, config, micro_batch_shape(config, run_stage))


def with_rows(spec: PipelineStageSpec, config: RunConfig, rows: MicroBatchShape) -> PipelineStageSpec:
    """Return the specification of the same pipeline stage, in the same run stage, for rows of another shape."""
    freeze = spec.run_stage.freeze

    def boundary(layer: int) -> Boundary:
        """Return what the chunk beginning with a layer receives, without gradients where nothing before is trained."""
        fields = family(config.model).boundary(config.model, layer, rows)
        if receives_gradients(config.model, layer, freeze):
            return fields
        return {name: replace(field, differentiable=False) for name, field in fields.items()}

    def ports(chunk: ModelChunk, before: Ports) -> Ports:
        return replace(
            before,
            incoming={} if chunk.first else boundary(chunk.layers.start),
            outgoing={} if chunk.last else boundary(chunk.layers.stop),
        )

    return replace(spec, rows=rows, ports=tuple(map(ports, spec.chunks, spec.ports)))


def _modules(model: ModelConfig, head: Head, chunk: ModelChunk, functions: Functions) -> nn.Module:
    return family(model).build(model, chunk, functions, head)


def build_pipeline(config: RunConfig, spec: PipelineStageSpec, groups: Groups, device: torch.device) -> Pipeline:
    """Build this rank's pipeline stage with its initial weights and its schedule. Collective over the world."""
    engine = build_engine(config, spec, groups, device)
    # With `init_from` the weights come from there, or from a checkpoint of the run: zero until then.
    if config.init_from is None:
        engine.fill(InitialRows(config.model, config.seed))
    return Pipeline(engine, groups, spec, config.parallel.schedule)


class InitialRows:
    """Rows of the initial weights that a seed gives; the parameter that was asked for last is kept."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._held: tuple[str, torch.Tensor] | None = None

    def __call__(self, spec: ParameterSpec, first: int, end: int) -> torch.Tensor:
        # A parameter is drawn whole, whichever rows are wanted: values then cannot depend on the layout.
        if self._held is None or self._held[0] != spec.name:
            self._held = spec.name, initial_value(spec, self._model, self._seed)
        return self._held[1][first:end]


def rebuild(pipeline: Pipeline, config: RunConfig, spec: PipelineStageSpec) -> None:
    """Make a pipeline's engine again for the parameters that `spec` trains. Collective over the world.

    Weights, and moments of the parameters that stay trained, are carried over; newly trained ones begin at zero. There
    is never more than one engine: the state waits in host memory.
    """
    before = pipeline.engine
    groups, device, carried = before.groups, before.device, Carried(before)
    before.close()
    gc.collect()  # DeepSpeed's engine and its hooks refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    pipeline.engine, pipeline.spec = build_engine(config, spec, groups, device), spec
    carried.put_into(pipeline.engine)


def build_engine(config: RunConfig, spec: PipelineStageSpec, groups: Groups, device: torch.device) -> StageEngine:
    """Build this rank's pipeline stage under ZeRO, its weights still zero. Collective over the world."""
    functions = _functions(config.parallel, groups)
    distilled = None
    if any(run_stage.regularization.distillation for run_stage in config.stages):
        vocabulary = DistilledCrossEntropy(functions.linear_cross_entropy, groups.tensor)
        distilled = DistilledLosses(vocabulary, DistilledLabels())
        functions = replace(functions, linear_cross_entropy=vocabulary, label_cross_entropy=distilled.labels)
    # Whole weights take no memory on the meta device; each rank allocates after `shard` has cut them to its part.
    with torch.device("meta"):
        chunks = [spec.modules(chunk, functions) for chunk in spec.chunks]
    stage = StageModule(chunks, spec.aliases)
    shard(stage, spec.parameters, stage.logical_names, groups.tensor, sequence_parallel=config.parallel.shared_by > 1)
    on = "cuda" if device.type == "cuda" else "cpu"
    _recompute(config, chunks, recomputed_layers(config, groups.layout, groups.coordinates.stage, on))
    held = [spec.parameters[stage.logical_names[name]] for name, _ in stage.named_parameters()]
    partial_gradients = _partial_gradients(config, spec.parameters.values())
    number = config.stages.index(spec.run_stage)
    engine = StageEngine(
        stage,
        parameter_groups(held, config.optimizer, spec.tied_stages, partial_gradients, config.stages, number),
        partial(make_optimizer, config=config.optimizer),
        deepspeed_config(
            config.parallel,
            config.precision,
            config.optimizer,
            # DeepSpeed takes one number for the whole run; with a batch ramp the real one of a step is at most this.
            num_micro_batches(spec.run_stage.batches.largest, config.parallel, groups.layout.data),
            # sizes DeepSpeed's reduction buckets
            sum(one.local_numel(groups.tensor.size) for one in held if one.name not in spec.frozen),
        ),
        config.parallel,
        groups,
        device,
    )
    engine.distilled = distilled
    return engine


def _cut(config: RunConfig, layout: Layout) -> tuple[ModelConfig, int, int, RowLengths]:
    """Return the arguments of `stage_chunks` and `tied_stages`: the cut is one for all run stages."""
    return config.model, layout.pipe, config.parallel.chunks_per_stage, cut_lengths(config, layout)


def micro_batch_shape(config: RunConfig, run_stage: RunStage) -> MicroBatchShape:
    """Return the shape of the rows that pass through the pipeline stages."""
    return MicroBatchShape(
        num_rows=config.parallel.micro_batch_size,
        length=run_stage.sequence_length,
        dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        segments=has_segments(run_stage.data.attention, run_stage.objective),
        decoder_length=held_lengths(run_stage, config.parallel).decoder,
        shared_by=config.parallel.sequence_ranks,
    )


def _functions(parallel: ParallelConfig, groups: Groups) -> Functions:
    functions = PLAIN
    if parallel.tensor > 1:
        # Each tensor rank has the logits of a slice of the vocabulary (Shoeybi et al. 2019, Megatron-LM).
        loss = partial(vocabulary_cross_entropy, group=groups.tensor)
        functions = replace(functions, linear_cross_entropy=loss, tensor_rank=groups.tensor.position)
    if parallel.shared_by > 1:
        # sequence parallelism along the tensor axis (Korthikanti et al. 2022)
        functions = replace(functions, whole_rows=partial(whole_rows, group=groups.tensor))
    if parallel.sequence > 1:
        # all-to-all from tokens to heads and back around attention (Jacobs et al. 2023, DeepSpeed Ulysses)
        functions = replace(
            functions,
            attention=partial(sequence_attention, group=groups.sequence),
            whole_sequence=partial(whole_sequence, group=groups.sequence),
        )
    sequence_slice = SequenceSlice(groups.sequence.position, groups.sequence.size, parallel.shared_by)
    return replace(functions, sequence_slice=sequence_slice)


def _partial_gradients(config: RunConfig, parameters: Iterable[ParameterSpec]) -> frozenset[str]:
    """Return the parameters that every tensor rank holds whole and computes a part of the gradient of.

    A norm of heads sees its rank's heads only. Under sequence parallelism a rank sees a slice of each row between the
    blocks, so a norm there has a part of its gradient on every rank; the model's heads see whole rows.
    """
    parallel, sees_whole_rows = config.parallel, figures(config.model).sees_whole_rows
    if parallel.tensor == 1:
        return frozenset()
    # A split parameter's gradient is whole on the rank that holds it; only replicated ones need a sum over the ranks.
    replicated = [spec.name for spec in parameters if spec.sharding.dim is None]
    shares_rows = parallel.shared_by > 1
    return frozenset(name for name in replicated if of_each_head(name) or (shares_rows and not sees_whole_rows(name)))


def _recompute(config: RunConfig, chunks: Sequence[nn.Module], layers: Container[int]) -> None:
    """Make the chunks' layers of these global numbers recompute; a family keeps its layers in `layers`."""
    if config.parallel.recompute != "none":
        # Names of children are global layer numbers: those of a second stage may begin at "4".
        held = [item for chunk in chunks for item in chunk.get_submodule("layers").named_children()]
        recompute([layer for number, layer in held if int(number) in layers], config.parallel.recompute)
