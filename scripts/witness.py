#!/usr/bin/env python3
"""GPTQ once more, in f64 and in plain numpy, written from the papers and docs/FORMAT.md: it shares no line with the solver.

usage: witness.py FIXTURES_FOLDER        (needs numpy, safetensors and tokenizers; half a minute)

Quantizes the first block of FIXTURES_FOLDER/verne in each of SETTINGS and writes FIXTURES_FOLDER/witness.safetensors:

    input_ids                    i32 [WINDOWS, WINDOW], the calibration windows
    SETTING/LINEAR.codes         u8, the codes [K, N] row by row as one stream of fields of `bits` bits, least significant first
    SETTING/LINEAR.scales        f16 [G, N]
    SETTING/LINEAR.zeros         u8 [G, N]; of asymmetric grids, others have 2^(bits - 1)
    SETTING/LINEAR.g_idx         u8 [K]; of act-order, others have k / GROUP

SETTING: BITSbit-GROUPg-(v1|v2)-(sym|asym)-(natural|act|static|aware)[-search], GROUP `no` for one group a row.

Letters are those of Frantar et al. (arXiv 2210.17323): W [N, K] the weight of a linear, X its inputs, H = 2 X X^T.
"""
import json
import sys

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

# The first windows from this token on in which no search of SETTINGS has to choose between equal grids.
FIRST, WINDOWS, WINDOW = 4352, 32, 128
DAMP = 0.1
SETTINGS = [
    "4bit-32g-v1-sym-natural", "4bit-64g-v1-asym-act", "4bit-32g-v2-asym-static", "4bit-64g-v1-sym-act-search",
    "3bit-32g-v2-sym-aware", "3bit-32g-v1-asym-act", "2bit-32g-v2-asym-natural", "2bit-nog-v1-sym-act",
    "2bit-32g-v1-sym-static-search", "8bit-nog-v2-asym-natural",
]
# Of wide codes these are enough: the folder is part of every clone.
ATTENTION_ONLY = {"8bit-nog-v2-asym-natural"}
# Shares of a group's range that the search tries, from 1 down to this.
LEAST_SHARE, SHARES = {2: 0.30, 3: 0.45, 4: 0.55, 8: 0.55}, 46
# Two grids of a search whose errors lie nearer than this, relative to the better one, may be told apart either way in f32.
GRID_MARGIN = 1e-5


class Grid:
    """Scale and zero of one group of one output: the value of a code is scale * (code - zero)."""

    def __init__(self, low, high, bits, sym, version):
        top, least_zero = 2**bits - 1, 1 if version == "v1" else 0  # v1 stores zero - 1
        if sym:
            scale, zero = 2 * max(high, -low) / top, (top + 1) // 2
        elif low == high == 0:
            scale, zero = 0.0, max(least_zero, 1)
        else:
            scale = f16((high - low) / top)
            zero = int(np.clip(np.floor(-low / scale + 0.5), 0, top))
            if zero < least_zero:
                scale, zero = high / (top - least_zero), least_zero
        self.scale, self.zero, self.top = f16(scale) if scale else 1.0, zero, top

    def code(self, w):
        return np.clip(np.rint(w / self.scale) + self.zero, 0, self.top)

    def value(self, code):
        return self.scale * (code - self.zero)


def f16(scale):
    """As it is stored, and never subnormal."""
    return float(np.float16(max(scale, 2.0**-14)))


def fit(w, importance, setting):
    """The grid of the weights `w` of one group of one output."""
    low, high = min(0.0, w.min()), max(0.0, w.max())
    if not setting["search"]:
        return Grid(low, high, setting["bits"], setting["sym"], setting["version"])
    least = LEAST_SHARE[setting["bits"]]
    tried = {}
    for c in range(SHARES):
        share = 1 - c * (1 - least) / (SHARES - 1)
        grid = Grid(low * share, high * share, setting["bits"], setting["sym"], setting["version"])
        error = (importance * (w - grid.value(grid.code(w))) ** 2).sum()
        tried.setdefault((grid.scale, grid.zero), (error, grid))
    (best, grid), *others = sorted(tried.values(), key=lambda pair: pair[0])
    assert not others or others[0][0] > best * (1 + GRID_MARGIN), "two grids are equally good: take other windows"
    return grid


def groups_of(setting, diagonal):
    """The order of columns, and the group of each column."""
    k = len(diagonal)
    size = setting["group"] or k
    natural = np.arange(k)
    fall = lambda columns: columns[np.argsort(-diagonal[columns], kind="stable")]
    if setting["order"] == "natural":
        return natural, natural // size
    if setting["order"] == "aware":
        parts = [fall(natural[at : at + size]) for at in range(0, k, size)]
        parts.sort(key=lambda part: -diagonal[part[0]])
        return np.concatenate(parts), natural // size
    order = fall(natural)
    if setting["order"] == "static":
        return order, natural // size
    groups = np.empty(k, int)
    groups[order] = natural // size
    return order, groups


def gptq(W, X, setting):
    """Codes [K, N], scales and zeros [G, N], g_idx [K], and the dequantized weight."""
    n, k = W.shape
    H = 2 / len(X) * X.T @ X
    order, g_idx = groups_of(setting, np.diag(H).astype(np.float32))
    H = H + DAMP * np.diag(H).mean() * np.eye(k)
    importance = np.diag(H).copy()
    # Upper Cholesky factor of the inverse, in the order of rounding.
    inverse = np.linalg.inv(H[np.ix_(order, order)])
    U = np.linalg.cholesky(inverse).T
    W = W.copy()
    codes, Q = np.zeros((k, n), np.uint8), np.zeros_like(W)
    grids = {}

    def fit_group(group):
        members = np.flatnonzero(g_idx == group)
        grids[group] = [fit(W[row, members], importance[members], setting) for row in range(n)]

    if setting["order"] == "static":
        for group in range(g_idx.max() + 1):
            fit_group(group)
    for at, column in enumerate(order):
        group = g_idx[column]
        if group not in grids:
            fit_group(group)
        for row, grid in enumerate(grids[group]):
            code = grid.code(W[row, column])
            codes[column, row], Q[row, column] = code, grid.value(code)
        error = (W[:, column] - Q[:, column]) / U[at, at]
        W[:, order[at + 1 :]] -= np.outer(error, U[at, at + 1 :])
    table = [grids[group] for group in range(len(grids))]
    scales = np.array([[grid.scale for grid in row] for row in table], np.float16)
    zeros = np.array([[grid.zero for grid in row] for row in table], np.uint8)
    return codes, scales, zeros, g_idx.astype(np.uint8), Q


def norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def rotate(x, base):
    """Rotary embedding of [windows, positions, heads, width], halves of a head against each other."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, config):
    heads, shared, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    cut = lambda x, count: x.reshape(WINDOWS, WINDOW, count, width)
    q, k = rotate(cut(q, heads), config["rope_theta"]), rotate(cut(k, shared), config["rope_theta"])
    k, v = (np.repeat(x, heads // shared, axis=2) for x in (k, cut(v, shared)))
    scores = np.einsum("wihd,wjhd->whij", q, k) / np.sqrt(width)
    scores = np.where(np.tri(WINDOW, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return np.einsum("whij,wjhd->wihd", scores, v).reshape(-1, heads * width)


def block(weights, x, config, setting):
    """One pass through block 0: each linear is quantized behind those before it. Yields names and results."""
    at = "model.layers.0."
    made = {}

    def quantized(name, inputs):
        *result, Q = gptq(weights[f"{at}{name}.weight"], inputs, setting)
        made[at + name] = result
        return inputs @ Q.T

    epsilon = config["rms_norm_eps"]
    inputs = norm(x, weights[f"{at}input_layernorm.weight"], epsilon)
    q, k, v = (quantized(f"self_attn.{name}_proj", inputs) for name in "qkv")
    x = x + quantized("self_attn.o_proj", attention(q, k, v, config))
    if setting["name"] in ATTENTION_ONLY:
        return made
    inputs = norm(x, weights[f"{at}post_attention_layernorm.weight"], epsilon)
    gate, up = (quantized(f"mlp.{name}_proj", inputs) for name in ("gate", "up"))
    quantized("mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return made


def parsed(name):
    bits, group, version, grid, order, *search = name.split("-")
    return {
        "name": name, "bits": int(bits.removesuffix("bit")), "group": None if group == "nog" else int(group.removesuffix("g")),
        "version": version, "sym": grid == "sym", "order": order, "search": bool(search),
    }


def stream(codes, bits):
    fields = (codes.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(fields.astype(np.uint8).reshape(-1), bitorder="little")


def main():
    folder = sys.argv[1]
    config = json.load(open(f"{folder}/verne/config.json"))
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(f"{folder}/verne/model.safetensors").items()}
    ids = Tokenizer.from_file(f"{folder}/verne/tokenizer.json").encode(open(f"{folder}/verne-calibration.txt").read()).ids
    ids = np.array(ids[FIRST : FIRST + WINDOWS * WINDOW], np.int32).reshape(WINDOWS, WINDOW)
    hidden = weights["model.embed_tokens.weight"][ids.reshape(-1)]
    tensors = {"input_ids": ids}
    for name in SETTINGS:
        setting = parsed(name)
        for linear, (codes, scales, zeros, g_idx) in block(weights, hidden, config, setting).items():
            parts = {"codes": stream(codes, setting["bits"]), "scales": scales}
            parts |= {} if setting["sym"] else {"zeros": zeros}
            parts |= {"g_idx": g_idx} if setting["order"] == "act" else {}
            tensors |= {f"{name}/{linear}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
        print(name, flush=True)
    save_file(tensors, f"{folder}/witness.safetensors")


if __name__ == "__main__":
    main()
