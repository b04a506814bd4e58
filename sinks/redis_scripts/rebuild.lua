-- Writes a ledger anew from what is known of it elsewhere; nothing but a rebuild may do so.
-- KEYS  1 meta, 2 bits, 3 open, 4 epoch of the delivery key, 5 scratch.
-- ARGV  1 dataset, 2 count, 3 accepted bits at full length, 4 who, 5 '1': the epoch is raised
--       whatever it is, '0': where no rebuild raised it yet, '': never; then ordinal as 4 bytes
--       and matter by turns.
-- What is left of the ledger stays where it says 'accepted', and is forgotten otherwise. The
-- sequence jumps to the time in milliseconds: beyond all that was ever seen, since no ledger is
-- called a thousand times a second for all its life. Likewise the epoch, to the time in seconds.
-- Answers 'ok', sequence, epoch, how many are accepted, how many matters are open.
redis.replicate_commands()
local RAISED = 1000000000
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)

local meta = redis.call('HMGET', KEYS[1], 'dataset', 'seq', 'count')
if meta[1] and (meta[1] ~= ARGV[1] or meta[3] ~= ARGV[2]) then
  return {'differs', meta[1], tonumber(meta[3])}
end
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[5], ARGV[3])
  redis.call('BITOP', 'OR', KEYS[2], KEYS[2], KEYS[5])
  redis.call('DEL', KEYS[5])
end
redis.call('DEL', KEYS[3])
local pairs_, open = {}, 0
for i = 6, #ARGV, 2 do
  local ordinal = struct.unpack('>I4', ARGV[i])
  if redis.call('GETBIT', KEYS[2], ordinal) == 0 then
    pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = ARGV[i], ARGV[i + 1]
    open = open + 1
    if #pairs_ >= 2000 then
      redis.call('HSET', KEYS[3], unpack(pairs_))
      pairs_ = {}
    end
  end
end
if #pairs_ > 0 then redis.call('HSET', KEYS[3], unpack(pairs_)) end

local epoch = tonumber(redis.call('GET', KEYS[4]) or 0)
if ARGV[5] == '1' or ARGV[5] == '0' and epoch < RAISED then
  epoch = math.max(epoch + 1, tonumber(clock[1]))
  redis.call('SET', KEYS[4], string.format('%d', epoch))
end
local seq = math.max((tonumber(meta[2]) or 0) + 1, now_ms)
redis.call('HSET', KEYS[1], 'dataset', ARGV[1], 'count', ARGV[2], 'seq',
  string.format('%d', seq), 'rebuilt_ms', string.format('%d', now_ms), 'rebuilt_by', ARGV[4])
return {'ok', seq, epoch, redis.call('BITCOUNT', KEYS[2]), open}
