"""Measuring the ops: named workloads, timing beside peers, one record for every result, and what is made of records.

workloads   what is measured, by names that never change, with the bytes and flops of each
record      the one form in which every result is kept (record.schema.json)
machine     the machine that a result was measured on
"""
