"""Runs that are killed, starved and lied to: does the training go on, or end as it would without the callbacks?"""
