"""Deterministic SAM weights and inputs from key names alone. numpy only; own code.

    weights = make_weights({key: shape, ...}, seed=0)     # Meta checkpoint names, torch layouts, float32
    image   = make_image(seed, height, width)             # uint8 HWC

Each tensor depends only on (its key, its shape, `seed`), never on the order in which tensors are
made, so a PyTorch and a JAX implementation can build identical weights without storing any.

Bit-exactness: the stream is PCG64 seeded by SeedSequence([crc32(key), seed]) (both algorithms are
frozen in numpy).  Weights are uniform (53-bit doubles, exact arithmetic up to one float64 multiply
and add, then one rounding to float32).  The few "standard normal" embeddings use the sum of twelve
uniforms minus six (mean 0, variance 1), so that no libm function and no ziggurat table is involved.
`digest()` gives a SHA-256 to compare before comparing activations.

Scales were chosen so that (a) activations stay O(1) through 32 blocks and (b) details are visible
well above float32 noise: attention logits have standard deviation near 2 (not flat), rel_pos adds
about 0.5 per axis to the logits, GELU inputs are O(1) (exact vs tanh shows), and the inputs of
several LayerNorms are deliberately small (a wrong epsilon shows).
"""

import hashlib
import math
import zlib

import numpy as np

SQRT12 = math.sqrt(12.0)


def _rng(key, seed):
    ss = np.random.SeedSequence([zlib.crc32(key.encode("utf-8")) & 0xFFFFFFFF, int(seed)])
    return np.random.Generator(np.random.PCG64(ss))


def _uniform(rng, shape, std, mean=0.0):
    """Uniform with the given mean and standard deviation, float32."""
    u = rng.random(shape)  # float64 in [0, 1)
    u -= 0.5
    u *= SQRT12 * std
    if mean:
        u += mean
    return u.astype(np.float32)


def _normal(rng, shape):
    """Close to standard normal: Irwin-Hall(12) - 6, float32."""
    n = int(np.prod(shape))
    u = rng.random((n, 12))
    s = u[:, 0]
    for j in range(1, 12):  # fixed summation order
        s = s + u[:, j]
    return (s - 6.0).reshape(shape).astype(np.float32)


_NORMAL_ENDINGS = (
    "positional_encoding_gaussian_matrix",
    "not_a_point_embed.weight",
    "no_mask_embed.weight",
    "iou_token.weight",
    "mask_tokens.weight",
)


def _is_norm(key):
    """LayerNorm / LayerNorm2d parameters, by Meta's names."""
    p = key.split(".")
    return (
        p[-2] in ("norm1", "norm2", "norm3", "norm4", "norm_final_attn")
        or key.startswith(("image_encoder.neck.1.", "image_encoder.neck.3."))
        or key.startswith(("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_downscaling.4."))
        or key.startswith("mask_decoder.output_upscaling.1.")
    )


def _gain(key):
    """Multiplier on 1/sqrt(fan_in)."""
    if key.startswith("image_encoder."):
        if ".patch_embed." in key:
            return 0.1  # small residual stream at first: LN eps shows
        if ".neck.0." in key or ".neck.2." in key:
            return 0.1  # small inputs to LayerNorm2d
        if ".attn.proj." in key or ".mlp.lin2." in key:
            return 0.5  # residual branches
        if ".mlp.lin1." in key:
            return 1.2
    if key.startswith("mask_decoder."):
        if ".layers.0.self_attn.out_proj." in key:
            return 0.1  # feeds norm1 without a residual: LN eps shows
        if ".q_proj." in key or ".k_proj." in key:
            return 1.4
        if "output_upscaling.0." in key:
            return 0.1
        if "output_upscaling.3." in key:
            return 2.0
        if "hypernetworks" in key or "iou_prediction_head" in key:
            return 1.4  # ReLU MLPs
    return 1.0


def make_tensor(key, shape, seed=0):
    """One tensor (float32, torch layout) from its Meta checkpoint key."""
    shape = tuple(int(s) for s in shape)
    rng = _rng(key, seed)
    if key.endswith(_NORMAL_ENDINGS) or ".point_embeddings." in key:
        return _normal(rng, shape)
    if key.endswith((".rel_pos_h", ".rel_pos_w")):
        return _uniform(rng, shape, 0.5 / math.sqrt(shape[-1]))
    if key.endswith("pos_embed"):
        return _uniform(rng, shape, 0.05)
    if _is_norm(key):
        return _uniform(rng, shape, 0.1, 1.0 if key.endswith(".weight") else 0.0)
    if key.endswith(".bias"):
        return _uniform(rng, shape, 0.02 if _gain(key) < 0.2 else 0.1)
    if key.endswith(".weight"):
        if len(shape) == 2:
            fan_in = shape[1]
        elif "output_upscaling" in key:  # ConvTranspose2d (in, out, kh, kw), stride = kernel
            fan_in = shape[0]
        else:  # Conv2d (out, in, kh, kw)
            fan_in = shape[1] * shape[2] * shape[3]
        w = _uniform(rng, shape, _gain(key) / math.sqrt(fan_in))
        if key.endswith(".attn.qkv.weight"):
            # rows are [q | k | v]; sharpen attention through q and k only
            w[: 2 * (shape[0] // 3)] *= np.float32(1.5)
        return w
    raise KeyError(f"no rule for {key!r} {shape}")


def make_weights(shapes, seed=0):
    """{key: shape} -> {key: float32 array}."""
    return {k: make_tensor(k, s, seed) for k, s in shapes.items()}


def digest(weights):
    """SHA-256 over all tensors in key order (little-endian float32 bytes)."""
    h = hashlib.sha256()
    for k in sorted(weights):
        h.update(k.encode() + b"\0")
        h.update(np.ascontiguousarray(weights[k], dtype="<f4").tobytes())
    return h.hexdigest()


def sam_shapes(cfg):
    """All Meta checkpoint keys and shapes for a flat config dict (no torch needed)."""
    c, p, d = cfg["embed_dim"], cfg["patch_size"], cfg["out_chans"]
    g = cfg["image_size"] // p
    hd = c // cfg["num_heads"]
    hid = int(c * cfg["mlp_ratio"])
    s = {}

    def lin(name, o, i, bias=True):
        s[name + ".weight"] = (o, i)
        if bias:
            s[name + ".bias"] = (o,)

    def norm(name, n):
        s[name + ".weight"] = (n,)
        s[name + ".bias"] = (n,)

    e = "image_encoder."
    if cfg["use_abs_pos"]:
        s[e + "pos_embed"] = (1, g, g, c)
    s[e + "patch_embed.proj.weight"] = (c, 3, p, p)
    s[e + "patch_embed.proj.bias"] = (c,)
    for i in range(cfg["depth"]):
        b = f"{e}blocks.{i}."
        n = g if i in cfg["global_attn_indexes"] or not cfg["window_size"] else cfg["window_size"]
        norm(b + "norm1", c)
        if cfg["use_rel_pos"]:
            s[b + "attn.rel_pos_h"] = (2 * n - 1, hd)
            s[b + "attn.rel_pos_w"] = (2 * n - 1, hd)
        lin(b + "attn.qkv", 3 * c, c, cfg["qkv_bias"])
        lin(b + "attn.proj", c, c)
        norm(b + "norm2", c)
        lin(b + "mlp.lin1", hid, c)
        lin(b + "mlp.lin2", c, hid)
    s[e + "neck.0.weight"] = (d, c, 1, 1)
    norm(e + "neck.1", d)
    s[e + "neck.2.weight"] = (d, d, 3, 3)
    norm(e + "neck.3", d)

    e = "prompt_encoder."
    m = cfg["mask_in_chans"]
    s[e + "pe_layer.positional_encoding_gaussian_matrix"] = (2, d // 2)
    for i in range(4):
        s[f"{e}point_embeddings.{i}.weight"] = (1, d)
    s[e + "not_a_point_embed.weight"] = (1, d)
    s[e + "mask_downscaling.0.weight"] = (m // 4, 1, 2, 2)
    s[e + "mask_downscaling.0.bias"] = (m // 4,)
    norm(e + "mask_downscaling.1", m // 4)
    s[e + "mask_downscaling.3.weight"] = (m, m // 4, 2, 2)
    s[e + "mask_downscaling.3.bias"] = (m,)
    norm(e + "mask_downscaling.4", m)
    s[e + "mask_downscaling.6.weight"] = (d, m, 1, 1)
    s[e + "mask_downscaling.6.bias"] = (d,)
    s[e + "no_mask_embed.weight"] = (1, d)

    e = "mask_decoder."
    t = e + "transformer."

    def attn(name, internal):
        for q in ("q_proj", "k_proj", "v_proj"):
            lin(f"{name}.{q}", internal, d)
        lin(f"{name}.out_proj", d, internal)

    for i in range(cfg["decoder_depth"]):
        b = f"{t}layers.{i}."
        attn(b + "self_attn", d)
        attn(b + "cross_attn_token_to_image", d // 2)
        attn(b + "cross_attn_image_to_token", d // 2)
        lin(b + "mlp.lin1", cfg["decoder_mlp_dim"], d)
        lin(b + "mlp.lin2", d, cfg["decoder_mlp_dim"])
        for j in (1, 2, 3, 4):
            norm(f"{b}norm{j}", d)
    attn(t + "final_attn_token_to_image", d // 2)
    norm(t + "norm_final_attn", d)
    nm = cfg["num_multimask_outputs"] + 1
    s[e + "iou_token.weight"] = (1, d)
    s[e + "mask_tokens.weight"] = (nm, d)
    s[e + "output_upscaling.0.weight"] = (d, d // 4, 2, 2)
    s[e + "output_upscaling.0.bias"] = (d // 4,)
    norm(e + "output_upscaling.1", d // 4)
    s[e + "output_upscaling.3.weight"] = (d // 4, d // 8, 2, 2)
    s[e + "output_upscaling.3.bias"] = (d // 8,)
    for i in range(nm):
        for j, (o, n) in enumerate([(d, d), (d, d), (d // 8, d)]):
            lin(f"{e}output_hypernetworks_mlps.{i}.layers.{j}", o, n)
    h, k = cfg["iou_head_hidden_dim"], cfg["iou_head_depth"]
    dims = [d] + [h] * (k - 1) + [nm]
    for j in range(k):
        lin(f"{e}iou_prediction_head.layers.{j}", dims[j + 1], dims[j])
    return s


# ----------------------------------------------------------------------------- inputs


def make_image(seed, height, width):
    """uint8 HWC test image: blocky structure plus noise; integer arithmetic only, so bit-exact."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0x5A4D, int(seed)])))
    raw = lambda n: (rng.random(n) * 65536.0).astype(np.int64)  # 16-bit integers
    out = np.zeros((height, width, 3), np.int64)
    for cell, amp in ((47, 120), (16, 70), (5, 40), (1, 26)):
        gh, gw = -(-height // cell), -(-width // cell)
        v = (raw(gh * gw * 3) * amp >> 16).reshape(gh, gw, 3)
        out += np.repeat(np.repeat(v, cell, 0), cell, 1)[:height, :width]
    return np.clip(out, 0, 255).astype(np.uint8)


def make_array(name, shape, seed, std=1.0):
    """Seeded float32 array for other inputs (e.g. mask prompts)."""
    return (_normal(_rng("input:" + name, seed), tuple(shape)) * np.float32(std)).astype(np.float32)
