"""The plan of a run as text."""

from __future__ import annotations

from partialfc.plan.head import local_rows
from partialfc.plan.report import Plan
from partialfc.plan.sizes import format_bytes

__all__ = ["plan_table"]


def plan_table(plan: Plan) -> str:
    """The plan as text."""
    sections = [_head_section(plan, name) for name in plan.heads]
    sections += [_memory_section(plan), _save_section(plan), _time_section(plan), _communication_section(plan)]
    sections += [_layout_section(plan)] if plan.layouts else []
    return "\n\n".join(sections)


def _rows(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    values = max(len(value) for _, value in rows)
    return "\n".join(f"  {name:<{width}}  {value:>{values}}" for name, value in rows)


def _head_section(plan: Plan, name: str) -> str:
    head, rows = plan.heads[name], plan.rows(name)
    in_play = plan.rows_in_play(name)
    centers = f", {head.settings.num_subcenters} sub-centers each" if head.settings.num_subcenters > 1 else ""
    title = f"Head {name}: {plan.identities[name]:,} identities, D = {head.embedding_dim}{centers}"
    parts = [
        (f"{part.name} ({part.dtype}{', in host memory' if part.on_host else ''})", f"{part.bytes_per_class:,} B")
        for part in head.parts
    ]
    return "\n".join(
        [
            f"{title}\n\nstored for each class (counted)",
            _rows([*parts, ("together", f"{head.bytes_per_class:,} B")]),
            f"\n{rows:,} of them on a rank, {in_play:,} in play in a step of {head.global_batch_size:,} rows",
        ]
    )


def _memory_section(plan: Plan) -> str:
    cost, machine, num_gpus = plan.backbone, plan.machine, plan.machine.num_gpus
    rows = [
        ("backbone: parameters and buffers", format_bytes(cost.parameter_bytes)),
        ("backbone: gradients", format_bytes(cost.gradient_bytes)),
        ("backbone: optimizer state", format_bytes(cost.optimizer_bytes)),
        (
            f"backbone: activations of {plan.local_batch_size} images (estimate)",
            format_bytes(cost.activation_bytes(plan.local_batch_size)),
        ),
    ]
    for name, head in plan.heads.items():
        count = plan.rows(name)
        staged = head.staged_bytes(count, plan.num_shards(name))
        rows.append((f"head {name}: tables of {count:,} classes", format_bytes(head.table_bytes(count, on_host=False))))
        if staged:
            rows.append((f"head {name}: staged rows of a step", format_bytes(staged)))
        rows.append((f"head {name}: memory of a step (estimate)", format_bytes(head.step.bytes_for(count))))
    rows.append(("together", format_bytes(plan.gpu_bytes)))
    over = plan.gpu_bytes - machine.memory_bytes
    verdict = f"does NOT fit: {format_bytes(over)} too much" if over > 0 else f"fits, {format_bytes(-over)} left"
    gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''} of {format_bytes(machine.memory_bytes)}"
    rows.append((f"of {format_bytes(machine.memory_bytes)}", verdict))
    if plan.host_bytes:
        rows.append(("host memory for tables of this rank", format_bytes(plan.host_bytes)))
    most = plan.most_identities
    rows.append((f"most identities in head main on {gpus}", f"{most:,}"))
    if most and (host := plan.heads["main"].table_bytes(local_rows(most, plan.num_shards("main")), on_host=True)):
        rows.append(("host memory that each rank needs for so many", format_bytes(host)))
    return (
        "memory of a GPU (counted, but where it says estimate)\n"
        + _rows(rows)
        + "\n  not counted: CUDA context, NCCL, workspaces of cuDNN and cuBLAS, gaps between allocations; leave room"
    )


def _save_section(plan: Plan) -> str:
    save, rows = plan.save, []
    if save.copy_bytes:
        rows.append(("host memory: copy of a rank's state, kept from the first save on", format_bytes(save.copy_bytes)))
    rows += [
        ("host memory: held by the writer of a rank, at most", format_bytes(save.writer_bytes)),
        ("host memory for a save, on the rank with most", format_bytes(save.host_bytes)),
        ("storage of one checkpoint, all ranks together", format_bytes(save.disk_bytes)),
        (
            f"storage of {save.num_kept} of them, that being written included",
            format_bytes(save.num_kept * save.disk_bytes),
        ),
    ]
    return f"checkpoints with checkpoint.asynchronous={str(plan.saved.asynchronous).lower()} (counted)\n{_rows(rows)}"


def _time_section(plan: Plan) -> str:
    head, backbone, machine = plan.head_seconds, plan.backbone_seconds, plan.machine
    words = ["16-bit" if half else "float32" for half in (plan.half, plan.heads["main"].half)]
    rows = [
        (
            f"backbone ({words[0]}, {3 * plan.backbone.forward_flop / 1e9:.2f} GFLOP an image)",
            f"{1e3 * backbone:.2f} ms",
        ),
        (f"head ({words[1]} products)", f"{1e3 * head:.2f} ms"),
        ("share of the head", f"{head / (head + backbone):.1%}"),
    ]
    return (
        "least time of a step (a prediction: operations counted, rates ASSUMED, communication and data left out)\n"
        + _rows(rows)
        + f"\n  assumed: {machine.tflops:g} TFLOP/s for 16-bit products, {machine.tflops_fp32:g} for float32, "
        f"{machine.bandwidth_gb:g} GB/s of memory"
    )


def _communication_section(plan: Plan) -> str:
    title = "communication of a step (counted from shapes)"
    if not plan.communication:
        return f"{title}\n  none on one GPU"
    rows = [
        (name, f"{format_bytes(size):>11}   sent by a rank in a ring: {format_bytes(sent):>11}")
        for name, size, sent in plan.communication
    ]
    return f"{title}\n{_rows(rows)}"


def _layout_section(plan: Plan) -> str:
    machine, nodes = plan.machine, plan.machine.num_nodes
    title = f"class centers over {nodes} nodes of {machine.node_size} GPUs (counted from shapes)"
    words = {"all": "sharded over all ranks", "node": "all of them on each node"}
    rows = [
        (
            f"head.shard_over={layout}: {words[layout]}",
            f"sent by a node: {format_bytes(round(each.network_bytes)):>11}   "
            f"memory of a GPU: {format_bytes(each.gpu_bytes):>11}",
        )
        for layout, each in plan.layouts.items()
    ]
    if "node" not in plan.layouts:
        return f"{title}\n{_rows(rows)}\n  an option of a head does not go with head.shard_over=node"
    everywhere, each_node = plan.layouts["all"], plan.layouts["node"]
    chosen, why = "all", "a node sends less"
    if not each_node.fits:
        why = "with node a GPU has too little memory"
    elif each_node.network_bytes < everywhere.network_bytes:
        chosen = "node"
    return f"{title}\n{_rows(rows)}\n  recommended: head.shard_over={chosen}, since {why}"
