-- Remembers an opt-out for as long as a decision that did not know of it may still be acted upon.
-- KEYS  1 opt-outs, by time.  ARGV  members.
redis.replicate_commands()
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - OPT_OUT_MEMORY_MS)
for _, member in ipairs(ARGV) do redis.call('ZADD', KEYS[1], now, member) end
redis.call('PEXPIRE', KEYS[1], OPT_OUT_MEMORY_MS)
return now
