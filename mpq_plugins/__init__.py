"""mpq-plugins: decide once how many bits every layer, and every channel inside it, deserves.

    table = measure(model_or_path)
    plan = MixQuant(qem=2.0)(table)
    quantized = apply(model, plan)
    verify(quantized, plan)

Importing this package imports neither torch nor an adapter; each comes with the first use of what needs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
