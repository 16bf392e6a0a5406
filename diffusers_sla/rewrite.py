"""A layer keeps its model's own processor code; only the attention call in it comes to us.

Every native processor ends in `dispatch_attention_fn` ([B, L, H, D]) or `F.scaled_dot_product_attention`
([B, H, L, D]). `rewritten` derives a class whose `__call__` is the native source with those calls made methods of
`self`: projections, norms and rotary embedding stay to the letter and follow diffusers by themselves, `self` knows
which layer speaks, and torch.compile(fullgraph=True) traces it like the native one.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

from .errors import SLAUnsupportedError

_METHODS = {"dispatch_attention_fn": "attend_blhd", "scaled_dot_product_attention": "attend_bhld"}
_CONTEXT = "encoder_hidden_states"
_GIVEN = "_sla_context"  # what it was when the processor was called


class _RedirectCalls(ast.NodeTransformer):
    def __init__(self, has_context: bool):
        self.has_context = has_context
        self.redirected = 0

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        method = _METHODS.get(ast.unparse(node.func).split(".")[-1])
        if method is None:
            return node
        self.redirected += 1
        node.func = ast.Attribute(ast.Name("self", ast.Load()), method, ast.Load())
        if self.has_context:  # in joint attention its length says how many of the tokens are text
            node.keywords.append(ast.keyword("context", ast.Name(_GIVEN, ast.Load())))
        return node


@functools.cache
def rewritten(native: type, base: type) -> type:
    """Class `(base, native)` whose attention calls go to `self.attend_blhd` and `self.attend_bhld` of `base`.

    Both methods take the native call's arguments and, where the processor takes `encoder_hidden_states`, those as
    `context`.

    Raises:
        SLAUnsupportedError: The class makes no such call (a linear-attention processor, for example).
    """
    call = native.__call__
    tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    redirect = _RedirectCalls(_CONTEXT in inspect.signature(call).parameters)
    redirect.visit(tree)
    if not redirect.redirected:
        raise SLAUnsupportedError(f"{native.__name__} makes no attention call that SLA could take over")
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if redirect.has_context:
        function.body.insert(0, ast.parse(f"{_GIVEN} = {_CONTEXT}").body[0])
    function.decorator_list = []
    function.returns = None
    for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        argument.annotation = None  # would be evaluated here; the native signature is kept through __wrapped__
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, call.__code__.co_firstlineno - 1)  # tracebacks point into diffusers' own file
    namespace: dict = {}
    exec(compile(tree, inspect.getsourcefile(call) or "<native>", "exec"), call.__globals__, namespace)
    new_call: Any = functools.update_wrapper(namespace["__call__"], call)
    new_call.__defaults__, new_call.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
    return type(f"SLA{native.__name__}", (base, native), {"__call__": new_call, "native_class": native})
