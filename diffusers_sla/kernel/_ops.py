"""Namespace of the custom ops. An export of this folder brings its own version of this file."""


def add_op_namespace_prefix(name):
    return "diffusers_sla::" + name
