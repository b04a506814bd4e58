-- The opening of every script that changes a ledger (transforms/ledger.py has the rules).
-- KEYS  1 meta, 2 bits, 3 open, 4 epoch of the delivery key; further ones are the script's own.
-- ARGV  1 dataset and 2 sequence that the caller has seen, 3 its epoch as 4 bytes; all empty for
--       webhooks and people, who own nothing.
-- A matter: kind 1, epoch 4, generation 4, attempt 2, flag 1, milliseconds 8, then text. Kind and
-- flag: c claim (1: in doubt), h held (1: claim in doubt), x closed. Text: the provider, for x
-- 'outcome/reason'. Big-endian. Fields of `open` are ordinals as 4 bytes.
redis.replicate_commands() -- the clock is read before we write: log effects, not the script
local sub, read = string.sub, struct.unpack
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local now8 = struct.pack('>I8', now)
local owner = ARGV[3]

local meta = redis.call('HMGET', KEYS[1], 'dataset', 'seq', 'count')
local seq, count = tonumber(meta[2]), tonumber(meta[3])
if not meta[1] or redis.call('STRLEN', KEYS[2]) * 8 < count then return {'missing'} end
if owner ~= '' then
  if meta[1] ~= ARGV[1] or seq < tonumber(ARGV[2]) then return {'rolled back', meta[1], seq} end
  local epoch, mine = tonumber(redis.call('GET', KEYS[4]) or 0), read('>I4', owner)
  if epoch < mine then return {'epoch lost', epoch} end
  if epoch > mine then return {'fenced', epoch} end
  if seq > tonumber(ARGV[2]) then return {'moved', seq} end
end

local accepted, open, changed, taken = {}, {}, {}, {}

-- Reads the entries of the items from `first` on, in two commands whatever their number; items
-- begin with the ordinal. Answers an ordinal that is out of the ledger, if there is one.
local function load(first)
  local gets, fields = {}, {}
  for i = first, #ARGV do
    local ordinal = read('>I4', ARGV[i])
    if ordinal >= count then return ordinal end
    local n = #gets
    gets[n + 1], gets[n + 2], gets[n + 3] = 'GET', 'u1', ordinal
    fields[#fields + 1] = sub(ARGV[i], 1, 4)
  end
  if #fields == 0 then return end
  local bits = redis.call('BITFIELD_RO', KEYS[2], unpack(gets))
  local matters = redis.call('HMGET', KEYS[3], unpack(fields))
  for i, field in ipairs(fields) do
    accepted[field], open[field] = bits[i] == 1, matters[i]
  end
end

-- A later item of the same call must see what an earlier one left: all goes through the tables.
local function put(field, matter)
  open[field], changed[field] = matter, true
end

local function accept(field)
  accepted[field], taken[field] = true, true
  put(field, false)
end

local function hold(field, flag)
  local found = open[field]
  put(field, 'h' .. sub(found, 2, 11) .. flag .. now8 .. sub(found, 21))
  return open[field]
end

local function disown(field)
  local found = open[field]
  put(field, 'c\0\0\0\0' .. sub(found, 6, 11) .. '\1' .. sub(found, 13))
end

-- Writes what changed, in at most three commands, and moves the sequence on.
local function save()
  local sets, dels, bits = {}, {}, {}
  for field in pairs(changed) do
    if open[field] then
      sets[#sets + 1] = field
      sets[#sets + 1] = open[field]
    else
      dels[#dels + 1] = field
    end
  end
  for field in pairs(taken) do
    local n = #bits
    bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', read('>I4', field), 1
  end
  if #bits > 0 then redis.call('BITFIELD', KEYS[2], unpack(bits)) end
  if #dels > 0 then redis.call('HDEL', KEYS[3], unpack(dels)) end
  if #sets > 0 then redis.call('HSET', KEYS[3], unpack(sets)) end
  return redis.call('HINCRBY', KEYS[1], 'seq', 1)
end
