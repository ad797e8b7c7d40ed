# SPDX-License-Identifier: Apache-2.0
"""Secret keys, sampling, noise and the privacy budget. Imports nothing that knows a model."""
