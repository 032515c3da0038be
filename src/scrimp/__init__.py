"""scrimp: deep learning on a fraction of the usual compute, with the receipt.

Families of exchangeable methods (`scrimp.select`, ...), the meter that costs them
(`scrimp.meter`), and jobs that run end to end (`scrimp study`, `scrimp train`).
Importing this package loads neither torch nor any family; import the one you need.
"""

__version__ = "0.1.0"
