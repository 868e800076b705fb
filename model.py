"""Checkpoints (more follows)."""
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


# ---------------------------------------------------------------------------------------------------------------
# Files: everything on disk is safetensors + JSON, written to a temporary name and renamed.

def write_atomically(path, write):
    """Call `write(temporary_path)` and rename the result to `path`: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def save_tensors(path, tensors, metadata=None):
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p, metadata={k: str(v) for k, v in (metadata or {}).items()}))


def save_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))


def save_checkpoint(path, modules, optimizers, meta, generators=()):
    """One safetensors file that holds all that a run needs to go on.

    modules      {name: nn.Module or {name: tensor}}, optimizers {name: torch.optim.Optimizer}
    meta         JSON-able facts (step, flags), generators {name: torch.Generator}
    """
    tensors = {}
    for name, module in modules.items():
        state = module if isinstance(module, dict) else module.state_dict()
        tensors |= {f"{name}/{k}": v.clone() for k, v in state.items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}/{i}/{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    for name, generator in dict(generators).items():
        tensors[f"generator/{name}"] = generator.get_state().clone()
    save_tensors(path, tensors, {"meta": json.dumps(meta)})


def load_checkpoint(path, modules, optimizers, generators=()):
    """Restore what `save_checkpoint` wrote, in place; returns its meta."""
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()["meta"])
    groups = {}
    for key, value in load_file(path).items():
        name, _, rest = key.partition("/")
        groups.setdefault(name, {})[rest] = value
    for name, module in modules.items():
        if isinstance(module, dict):
            for k, v in module.items():
                v.data.copy_(groups[name][k])
        else:
            module.load_state_dict(groups[name])
    for name, optimizer in optimizers.items():
        state = {}
        for key, value in groups.get(f"optimizer.{name}", {}).items():
            i, k = key.split("/")
            state.setdefault(int(i), {})[k] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, generator in dict(generators).items():
        generator.set_state(groups["generator"][name])
    return meta
