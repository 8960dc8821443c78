"""NC-LQL's sampler and update beside the naive form of the same maths and the floor that matrix products set.

    python benchmarks/langevin.py         measures, prints a table, writes benchmarks/results/langevin.json

Reference mode, 3x256, batch 256, at the sizes of HalfCheetah and Humanoid. The naive form is what a reader of the
paper would write first: every step of the chain evaluates the whole critic, level embedding and first layer
included, critics under one `vmap`, Mish as x tanh(softplus(x)). Its outputs are compared with ours. The floor is
the floating-point operations of the matrix products over the rate measured in the same run. For few observations
that rate is out of reach, since every weight is read from memory for each: there the floor is the time of the
chain's matrix products alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen.algorithms.nclql import NCLQL
from eqgen.envs.base import example_transition
from eqgen.networks.embeddings import sinusoid
from eqgen.provenance import provenance
from eqgen.tree import compile_ahead, compile_bound
from measure import BATCH, TASKS, agent_costs, gemm_gflops, random_batch, timed, write


AGENT = NCLQL()


def naive_mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def naive_q(critics, obs, action, level):
    """The values by every member, from nothing but the arrays of the networks."""

    def network(x, layers):
        for number, layer in enumerate(layers):
            x = (naive_mish(x) if number else x) @ jnp.concatenate(layer.weights) + layer.bias
        return x

    def one(member, embedder):
        embedding = network(sinusoid(level), embedder.layers)
        return network(jnp.concatenate([obs, action, embedding]), member.layers)[0]

    return eqx.filter_vmap(one)(critics.members, critics.embedders)


def naive_sample(critics, obs, act, *, key):
    """The reference sampler with the random numbers of `AGENT.sample`."""
    start_key, chain_key = jr.split(key)
    repeated = lambda x: jnp.repeat(x, AGENT.steps_per_level)
    levels, step_sizes = repeated(jnp.arange(AGENT.num_levels)), repeated(AGENT.step_sizes)

    def step(a, inputs):
        level, eta, key = inputs
        g = jax.grad(lambda a: jnp.sum(naive_q(critics, obs, a, level)))(a)
        drift = AGENT.initial_inverse_temperature * g / (jnp.sqrt(jnp.sum(g**2)) + 1e-8)
        return jnp.clip(a + eta / 2 * drift + jnp.sqrt(eta) * jr.normal(key, a.shape), -1, 1), None

    start = jr.uniform(start_key, (act,), minval=-1.0, maxval=1.0)
    return jax.lax.scan(step, start, (levels, step_sizes, jr.split(chain_key, levels.size)))[0]


def products_alone(critics, x):
    """The matrix products of a chain on the rows of `x`, in their order, and nothing else."""
    arrays = [layer.weights for layer in critics.members.layers]
    members = [jax.tree.map(lambda w, i=i: w[i], arrays) for i in range(critics.size)]

    def step(x, _):
        total = 0.0
        for (_, first, _), *square, (last,) in members:
            h = x @ first
            for (weight,) in square:
                h = h @ weight
            g = (h @ last) @ last.T
            for (weight,) in reversed(square):
                g = g @ weight.T
            total = total + g @ first.T
        return x + 1e-3 * total, None

    return jax.lax.scan(step, x, length=AGENT.num_levels * AGENT.steps_per_level)[0]


def operations(obs: int, act: int, width: int = 256, layers: int = 3) -> dict[str, float]:
    """GFLOP of the matrix products that one update cannot do without: of the sampler and in all.

    A sampler step is a forward pass and a gradient in the action: products with the action's share of the first
    layer and with the square layers, twice. The losses take a forward and two backward passes, at the clean and
    at a noised level, and the target a forward pass of the target critics.
    """
    square, batch = (layers - 1) * width**2, 2 * 2 * BATCH  # two critics, multiply and add
    sampler = AGENT.num_levels * AGENT.steps_per_level * 2 * batch * (square + act * width)
    learning = 7 * batch * (square + (obs + act + 17) * width)
    return {"sampler": sampler / 1e9, "update": (sampler + learning) / 1e9}


def measure(obs: int, act: int) -> dict:
    state = AGENT.init(example_transition((obs,), act), key=jr.key(0))
    observations, keys = random_batch(obs, act, key=jr.key(1)).next_obs, jr.split(jr.key(2), BATCH)
    forms = {
        "naive": lambda state, o, k: naive_sample(state.critics, o, act, key=k),
        "ours": lambda state, o, k: AGENT.sample(state, o, key=k),
    }
    costs, actions = {}, {}
    for name, form in forms.items():
        batched = lambda state, o, k, form=form: jax.vmap(lambda o, k: form(state, o, k))(o, k)
        compiled = compile_ahead(batched, state, observations, keys)
        actions[name] = compiled(state, observations, keys)
        call = lambda compiled=compiled: compiled(state, observations, keys)
        costs[f"sampler, {name}"] = timed(call, 20)
    # A chain is chaotic where its drift is clipped: single steps say whether the two forms are equal.
    q, level = lambda a, o: state.critics.at(o)(a, state.critics.level_shares()[3]), jnp.array(3)
    gradient = lambda f: jax.vmap(jax.grad(lambda a, o: jnp.sum(f(a, o))))(actions["ours"], observations)
    difference = gradient(q) - gradient(lambda a, o: naive_q(state.critics, o, a, level))
    costs["largest difference of a gradient"] = float(jnp.max(jnp.abs(difference)))
    costs["median difference of an action"] = float(jnp.median(jnp.abs(actions["ours"] - actions["naive"])))
    costs |= agent_costs(AGENT, obs, act)
    for n in (1, 5):
        alone, x = (
            compile_bound(lambda x: products_alone(state.critics, x), jnp.ones((n, act))),
            jnp.ones((n, act)),
        )
        many = lambda alone=alone, x=x: [jax.block_until_ready(alone(x)) for _ in range(20)]
        costs[f"act {n}, products alone"] = timed(many, 20, 20)
    return costs


def main():
    gemm = gemm_gflops()
    results = {"provenance": provenance(), "gemm_gflop": gemm, "tasks": {}}
    print(f"matrix product, GFLOP: {gemm}")
    for task, (obs, act) in TASKS.items():
        costs, gflop = measure(obs, act), operations(obs, act)
        floor = {name: round(1e3 * x / gemm["per_cpu_second"], 1) for name, x in gflop.items()}
        ratios = {
            "sampler: naive over ours": costs["sampler, naive"]["cpu_ms"] / costs["sampler, ours"]["cpu_ms"],
            "sampler: ours over floor": costs["sampler, ours"]["cpu_ms"] / floor["sampler"],
            "update: ours over floor": costs["update"]["cpu_ms"] / floor["update"],
        } | {
            f"act {n}: ours over products alone": costs[f"act {n}"]["cpu_ms"]
            / costs[f"act {n}, products alone"]["cpu_ms"]
            for n in (1, 5)
        }
        ratios = {name: round(value, 2) for name, value in ratios.items()}
        results["tasks"][task] = costs | {"floor_cpu_ms": floor, "ratios": ratios}
        print(task)
        for name, value in results["tasks"][task].items():
            print(f"  {name}: {value}", flush=True)
    write("langevin", results)


if __name__ == "__main__":
    main()
